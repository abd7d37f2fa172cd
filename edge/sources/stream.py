"""From a source to numbered frames in time: reads ahead, repeats, keeps a rate, drops late pictures of live sources."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from edge.frame_path import Frame
from edge.sources.source import Picture, Source
from refold.errors import RefoldError

__all__ = ["Prefetch", "Stream"]

log = logging.getLogger(__name__)
AHEAD = 8  # pictures read before they are wanted: hides a slow card, costs little memory
REST = 0.05  # seconds before a source that had nothing is asked again
DEBT = 1.0  # seconds a paced stream may be behind before it gives up catching up


class Prefetch:
    """Reads a source on a thread of its own. Of a live source only the newest picture waits; `lost` counts the others.

    Iterating yields Picture, or None after `REST` without one; it ends when the source does. An error of the source ends it too
    and is kept in `error`.
    """

    def __init__(self, source: Source) -> None:
        self.lost = 0
        self.error: RefoldError | None = None
        self._source = source
        self._ready: deque[Picture] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="source", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for picture in self._source:
                if self._stop.is_set():
                    return
                if picture is None:
                    self._stop.wait(REST)
                else:
                    self._put(picture)
        except RefoldError as e:
            self.error = e
        except Exception as e:  # of a decoder, say: without this the stream would look as if it had ended
            log.exception("the source failed")
            self.error = RefoldError(f"The source failed: {type(e).__name__}: {e}.")
        finally:
            self._ended = True
            with self._changed:
                self._changed.notify_all()

    def _put(self, picture: Picture) -> None:
        with self._changed:
            if self._source.live:
                self.lost += len(self._ready)
                self._ready.clear()
            while len(self._ready) >= AHEAD and not self._stop.is_set():
                self._changed.wait(0.5)
            self._ready.append(picture)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Picture | None]:
        while True:
            try:
                picture = self._ready.popleft()  # usually there is one: no lock
            except IndexError:
                with self._changed:
                    if not self._ready and not self._ended:
                        self._changed.wait(REST)
                if self._ended and not self._ready:
                    return
                if not self._ready:
                    yield None
                continue
            if len(self._ready) == AHEAD // 2 or self._source.live:
                with self._changed:
                    self._changed.notify_all()
            yield picture

    def close(self) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(5.0)


class Stream:
    """Numbered frames of a source, for the frame loop.

    Args:
        open_source: opens the source; called again for each repetition.
        fps: frames per second at most; 0 as fast as they are served.
        loop: begins again when the source ends.
        max_frames: ends after so many; 0 never.
        stop: ends the stream when set.
    """

    def __init__(
        self,
        open_source: Callable[[], Source],
        *,
        fps: float = 0.0,
        loop: bool = False,
        max_frames: int = 0,
        stop: threading.Event | None = None,
    ) -> None:
        self._open = open_source
        self._loop = loop
        self._max_frames = max_frames
        self._interval = 1.0 / fps if fps > 0 else 0.0
        self._stop = stop or threading.Event()
        self._source = open_source()
        self._pictures: Prefetch | Source = Prefetch(self._source) if self._reads_ahead else self._source
        self._lost = self._skipped = 0
        self._last_skipped = ""
        self.number = 0

    @property
    def _reads_ahead(self) -> bool:
        return self._source.slow or self._source.live

    @property
    def replayed(self) -> bool:
        """A file's frames at no pace of their own: nobody loses anything by waiting."""
        return self._source.replayed and not self._interval

    @property
    def lost(self) -> int:
        """Pictures of a live source that nobody was ready for."""
        return self._lost + (self._pictures.lost if isinstance(self._pictures, Prefetch) else 0)

    @property
    def skipped(self) -> int:
        """Pictures that could not be used."""
        return self._skipped + self._source.skipped.count

    @property
    def last_skipped(self) -> str:
        """Name and reason of the latest one."""
        return self._source.skipped.last or self._last_skipped

    def __iter__(self) -> Iterator[Frame | None]:
        """Frames; None where there is none at the moment (the caller may look after other things)."""
        due = time.perf_counter()
        while not self._stop.is_set():
            served = 0
            for picture in self._pictures:
                if self._stop.is_set():
                    return
                if picture is None:
                    if not isinstance(self._pictures, Prefetch):
                        self._stop.wait(REST)
                    yield None
                    continue
                if self._interval:
                    due = self._wait_until(due)
                    if self._stop.is_set():
                        return
                yield Frame(self.number, picture.image, picture.name, time.time_ns() // 1_000_000)
                self.number += 1
                served += 1
                if self._max_frames and self.number >= self._max_frames:
                    return
            if isinstance(self._pictures, Prefetch) and self._pictures.error is not None:
                raise self._pictures.error
            if not self._loop or not served:
                return
            self._again()

    def _wait_until(self, due: float) -> float:
        now = time.perf_counter()
        if due > now:
            self._stop.wait(due - now)
        elif now - due > DEBT:
            due = now
        return due + self._interval

    def _again(self) -> None:
        self.close()
        self._lost, self._skipped, self._last_skipped = self.lost, self.skipped, self.last_skipped
        self._source = self._open()
        self._pictures = Prefetch(self._source) if self._reads_ahead else self._source

    def close(self) -> None:
        if isinstance(self._pictures, Prefetch):
            self._pictures.close()
        self._source.close()
