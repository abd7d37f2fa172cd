"""The gains of a running model's RMS norms: all of a release at once, between two forwards, or nothing of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray

from refold.errors import NormStateError, RefoldError

__all__ = ["Gains"]

F32 = NDArray[np.float32]
LOOK_S = 0.02  # how often a waiting caller looks whether nobody generates


class Gains:
    """Exchanges gains of a model that other threads may be generating with.

    Args:
        turn: held during every forward.
        probe: one forward that raises when the model gives no finite number.
    """

    def __init__(self, model: torch.nn.Module, turn: threading.Lock, probe: Callable[[], None]) -> None:
        self._parameters = dict(model.named_parameters())
        self._turn, self._probe = turn, probe
        self._waiting: deque[tuple[Mapping[str, F32], Future[None]]] = deque()

    def put(self, gains: Mapping[str, F32]) -> None:
        """Puts gains, by parameter name, into service before the next forward, and returns when they are.

        A generation in progress goes on with them: what it already read of its text was read with the old ones.

        Raises:
            NormStateError: a name or shape that the model does not have.
            ModelError: the model gives no finite number with them; the old ones still serve.
        """
        for name, gain in gains.items():
            held = self._parameters.get(name)
            if held is None or tuple(held.shape) != gain.shape:
                raise NormStateError(f"The model has no gain {name} of shape {gain.shape}: refused.", code="shape")
        done: Future[None] = Future()
        self._waiting.append((gains, done))
        while not done.done():
            if self._turn.acquire(timeout=LOOK_S):
                try:
                    self.settle()
                finally:
                    self._turn.release()
        done.result()

    def settle(self) -> None:
        """Does what waits. The caller holds the turn and is between two forwards."""
        while self._waiting:
            gains, done = self._waiting.popleft()
            try:
                self._exchange(gains)
            except RefoldError as e:
                done.set_exception(e)
            else:
                done.set_result(None)

    def _exchange(self, gains: Mapping[str, F32]) -> None:
        before = {name: self._parameters[name].detach().clone() for name in gains}
        self._write({name: torch.from_numpy(np.array(gain)) for name, gain in gains.items()})
        try:
            self._probe()
        except BaseException:
            self._write(before)
            raise

    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._parameters[name].copy_(value)
