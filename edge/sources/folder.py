"""A folder of images in the order of their names; with `watch`, also those that arrive later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge.sources.pictures import SUFFIXES, Skipped, load_picture
from edge.sources.source import Picture
from refold.errors import InputError, UsageError
from refold.imaging import is_image_name
from refold.preprocess import Preprocess

__all__ = ["FolderSource"]

LOOKS = 8  # rests of the stream between two listings of the folder: half a second
FRESH_S = 2.0  # a file changed so lately may still be on its way
GROWTH = 120  # listings for which the end of a folder waits for files that go on growing: a minute
STILL = 5  # listings for which an unreadable file must stand still at the end of a folder: two seconds
DOUBTS = 10  # the same while a folder is watched, where nothing waits for it: four seconds


class _Stamp(NamedTuple):
    """What changes while somebody writes to a file, or replaces it."""

    size: int
    changed_ns: int  # of its content
    touched_ns: int  # of anything, its permissions included
    inode: int

    @property
    def content(self) -> tuple[int, int]:
        return self.size, self.changed_ns


class _Doubt(NamedTuple):
    stamp: _Stamp | None
    error: InputError
    looks: int = 0


class FolderSource:
    """The images of one directory, not of those below it.

    An image that cannot be decoded while it is still being written is tried again when it stands still; it counts as skipped
    only when it stands still and is unreadable.

    Args:
        watch: looks again for new images for ever; one is taken when its size and date stood still between two looks.
        only: one file's name instead of all.
    """

    live = False
    slow = True

    def __init__(self, directory: Path, preprocess: Preprocess, *, watch: bool = False, only: str | None = None) -> None:
        self.skipped = Skipped()
        self.replayed = not watch  # of images that arrive in a watched folder somebody waits for the answers
        self._directory = directory
        self._preprocess = preprocess
        self._watch = watch
        self._only = only
        self._doubtful: dict[str, _Doubt] = {}
        self._done: dict[str, _Stamp | tuple[int, int]] = {}
        if not watch and not self._names():
            raise UsageError(f"{directory} holds no image ({', '.join(sorted(SUFFIXES))}); give another folder or --watch.")

    def _names(self) -> list[str]:
        if self._only is not None:
            return [self._only]
        try:
            return sorted(p.name for p in self._directory.iterdir() if is_image_name(p.name))
        except OSError as e:
            raise UsageError(f"{self._directory} cannot be listed: {e.strerror or e}.") from e

    def __iter__(self) -> Iterator[Picture | None]:
        yield from self._follow() if self._watch else self._once()

    def _once(self) -> Iterator[Picture | None]:
        for name in self._names():
            yield from self._tried(name)
        for _ in range(GROWTH):
            if not self._doubtful:
                return
            for _ in range(LOOKS):
                yield None
            yield from self._looked_at_again(patience=STILL)
        for name, doubt in self._doubtful.items():
            self.skipped.add(name, doubt.error)

    def _follow(self) -> Iterator[Picture | None]:
        seen: dict[str, tuple[int, int]] = {}
        while True:
            names = self._names()
            for name in names:
                stamp = self._stamp(name)
                if stamp is None or name in self._doubtful or self._done.get(name) in (stamp, stamp.content):
                    continue
                if seen.get(name) == stamp.content:
                    yield from self._tried(name)
                else:
                    seen[name] = stamp.content
            for gone in self._done.keys() - set(names):
                self._done.pop(gone)
                seen.pop(gone, None)
            yield from self._looked_at_again(patience=DOUBTS)
            for _ in range(LOOKS):
                yield None

    def _stamp(self, name: str) -> _Stamp | None:
        path = self._directory / name
        try:
            try:
                found = path.stat()
            except OSError:
                found = path.lstat()  # a symbolic link that leads nowhere, yet
        except OSError:
            return None
        return _Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def _tried(self, name: str) -> Iterator[Picture]:
        """The image, or none and a doubt or a count."""
        stamp = self._stamp(name)
        try:
            picture = Picture(load_picture(self._directory / name, self._preprocess), name)
        except InputError as e:
            if self._is_on_its_way(stamp, e):
                self._doubtful[name] = _Doubt(stamp, e)
            else:
                self._give_up(name, stamp, e)
        else:
            if stamp is not None:
                self._done[name] = stamp.content
            yield picture

    def _give_up(self, name: str, stamp: _Stamp | None, error: InputError) -> None:
        """Until anything about the file changes, its permissions included."""
        self.skipped.add(name, error)
        if stamp is not None:
            self._done[name] = stamp

    def _is_on_its_way(self, stamp: _Stamp | None, error: InputError) -> bool:
        """Half a file reads like a damaged one; the clock of a network disk may be ahead."""
        return error.code == "unreadable" and stamp is not None and time.time() - stamp.touched_ns / 1e9 < FRESH_S

    def _looked_at_again(self, patience: int) -> Iterator[Picture]:
        """Each doubtful file once: a changed one is tried again, one that stood still for so many looks is given up."""
        for name, doubt in list(self._doubtful.items()):
            stamp = self._stamp(name)
            if stamp != doubt.stamp:
                del self._doubtful[name]
                yield from self._tried(name)
            elif doubt.looks + 1 >= patience:
                del self._doubtful[name]
                self._give_up(name, stamp, doubt.error)
            else:
                self._doubtful[name] = doubt._replace(looks=doubt.looks + 1)

    def close(self) -> None:
        return None
