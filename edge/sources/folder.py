"""A folder of images in the order of their names; with `watch`, also those that arrive later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from edge.sources.pictures import SUFFIXES, Skipped, load_picture
from edge.sources.source import Picture
from refold.errors import InputError, UsageError
from refold.preprocess import Preprocess

__all__ = ["FolderSource"]

LOOKS = 8  # rests of the stream between two listings of the folder: half a second


class FolderSource:
    """The images of one directory, not of those below it.

    Args:
        watch: looks again for new pictures for ever; one is taken when its size and date stood still between two looks.
        only: one file's name instead of all.
    """

    live = False
    slow = True

    def __init__(self, directory: Path, preprocess: Preprocess, *, watch: bool = False, only: str | None = None) -> None:
        self.skipped = Skipped()
        self._directory = directory
        self._preprocess = preprocess
        self._watch = watch
        self._only = only
        if not watch and not self._names():
            raise UsageError(f"{directory} holds no image ({', '.join(sorted(SUFFIXES))}); give another folder or --watch.")

    def _names(self) -> list[str]:
        if self._only is not None:
            return [self._only]
        try:
            return sorted(p.name for p in self._directory.iterdir() if p.suffix.lower() in SUFFIXES)
        except OSError as e:
            raise UsageError(f"{self._directory} cannot be listed: {e.strerror or e}.") from e

    def __iter__(self) -> Iterator[Picture | None]:
        if not self._watch:
            yield from self._load(self._names())
            return
        done: dict[str, tuple[int, int]] = {}
        seen: dict[str, tuple[int, int]] = {}
        while True:
            names = self._names()
            for name in names:
                now = self._stamp(name)
                if now and done.get(name) != now:
                    if seen.get(name) == now:
                        done[name] = now
                        yield from self._load([name])
                    else:
                        seen[name] = now
            for gone in done.keys() - set(names):
                done.pop(gone)
                seen.pop(gone, None)
            for _ in range(LOOKS):
                yield None

    def _stamp(self, name: str) -> tuple[int, int] | None:
        try:
            found = (self._directory / name).stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def _load(self, names: Iterable[str]) -> Iterator[Picture]:
        for name in names:
            try:
                picture = Picture(load_picture(self._directory / name, self._preprocess), name)
            except InputError as e:
                self.skipped.add(name, e)
            else:
                yield picture

    def close(self) -> None:
        return None
