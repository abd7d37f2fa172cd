"""From a kept frame to the outbox: encoding and fsync on a worker, several samples per commit."""

from __future__ import annotations

from collections import deque

from edge.encode import make_sample
from edge.frame_path import Frame, Prediction
from edge.outbox import Outbox
from edge.select import Verdict
from edge.worker import Runner
from refold.bundle import Bundle
from refold.errors import StorageError
from refold.v1 import samples_pb2 as pb

__all__ = ["SampleWriter"]

PER_COMMIT = 16  # samples in one transaction: an fsync costs more than encoding them


class SampleWriter:
    """Takes what the selector keeps. `stored` counts what reached the disk, `failed` what could not be stored for good.

    Args:
        queue: kept frames that may wait; beyond it they are refused (and counted by the frame path).
    """

    def __init__(self, bundle: Bundle, outbox: Outbox, runner: Runner, queue: int) -> None:
        self.stored = self.failed = 0
        self._bundle_digest = bundle.digest
        self._preprocess_digest = bundle.preprocess.digest
        self._outbox = outbox
        self._runner = runner
        self._queue = queue
        self._waiting: deque[tuple[Frame, Verdict, Prediction]] = deque()

    def add(self, frame: Frame, verdict: Verdict, prediction: Prediction) -> bool:
        """Never waits; False when too many wait already."""
        if len(self._waiting) >= self._queue:
            self._runner.offer(self.write)  # what waits may be waiting for a disk
            return False
        self._waiting.append((frame, verdict, prediction))
        return self._runner.offer(self.write) or len(self._waiting) > 1

    def write(self) -> None:
        """Encodes and stores what waits. Raises StorageError when the disk is full or stuck: those samples go on waiting."""
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(len(self._waiting), PER_COMMIT))]
            try:
                self.stored += self._outbox.put_many([self._sample(*one) for one in some])
            except StorageError:
                self._waiting.extendleft(reversed(some))
                raise
            except Exception:
                self.failed += len(some)
                raise

    def close(self) -> None:
        """Stores what waits, for the last time. Raises StorageError: it is lost, and counted."""
        try:
            self.write()
        except StorageError:
            self.failed += len(self._waiting)
            self._waiting.clear()
            raise

    def _sample(self, frame: Frame, verdict: Verdict, prediction: Prediction) -> tuple[pb.SampleHeader, bytes]:
        return make_sample(
            frame.image,
            verdict,
            predicted=prediction.predicted,
            frame=frame.number,
            bundle_digest=self._bundle_digest,
            preprocess_digest=self._preprocess_digest,
            release_version=prediction.release_version,
            domain=prediction.domain,
            taken_unix_ms=frame.unix_ms,
        )
