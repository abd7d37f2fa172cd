"""What a device asks of an engine, whatever runs it, and the slot a frame loop reads it from.

Runtime       one target of one bundle on one runtime: builds engines and tap engines of a serving state
Engine        the integer model at one state
TapEngine     its tap twin
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.engine.pictures import Scratch
from edge.serving import ServingState

__all__ = ["Engine", "EngineSlot", "PictureEngine", "Runtime", "TapEngine"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class PictureEngine(Protocol):
    """Takes 8-bit pictures without a float detour."""

    def run(self, image: U8, scratch: Scratch) -> F32:
        """Logits float32 (1, classes) of one C-contiguous picture, uint8 (H, W, 3), whose shape the caller has checked."""

    def run_all(self, images: U8) -> F32:
        """Logits float32 (N, classes) of pictures uint8 (N, H, W, 3)."""


class Engine(Protocol):
    """The integer model at one serving state; any thread may run it.

    Attributes:
        serving: the state it was built from.
        pictures: takes 8-bit pictures without a float detour, with the same answers; None where this model or its runtime does
            not allow it.
    """

    serving: ServingState

    @property
    def pictures(self) -> PictureEngine | None: ...

    def run(self, x: F32) -> F32:
        """float32 (N, 3, H, W) to logits float32 (N, classes). Raises InputError for another shape."""

    def run_pictures(self, images: U8) -> F32:
        """uint8 (N, H, W, 3), as the preprocessing takes them, to logits float32 (N, classes). Raises InputError as `apply`."""


class TapEngine(Protocol):
    """The same model's tap twin.

    Moments are mean and mean square over space of each norm's output, all sites with statistics in order;
    `refold.norms.unfold_moments` brings them back to the norm's input.
    """

    serving: ServingState

    def run(self, x: F32) -> F32:
        """float32 (N, 3, H, W) to moments float32 (N, 2, channels). Raises InputError for another shape."""


class Runtime(Protocol):
    """Opens the files of one target.

    Attributes:
        integer_layers: how many of the model's layers run in integers here.
        named: the runtime and its version, for people.
        platform: the runtime in the words of the Open Inference Protocol.
    """

    integer_layers: int
    named: str
    platform: str

    def build(self, serving: ServingState) -> Engine:
        """Raises NormStateError when the state does not fit the bundle, BundleError when the runtime refuses."""

    def build_taps(self, serving: ServingState, part: str) -> TapEngine:
        """`part`: path of the tap model in the bundle. Raises as `build`."""


class EngineSlot:
    """Where the frame loop finds its engine. Reading and swapping are one pointer each: neither ever waits.

    Who reads `current` keeps that engine for its frame; a swapped-out engine lives until the last such frame is done.
    """

    __slots__ = ("current", "swaps")

    def __init__(self, engine: Engine) -> None:
        self.current = engine
        self.swaps = 0

    def swap(self, engine: Engine) -> Engine:
        """Serves `engine` from the next frame on; returns the one served so far."""
        previous, self.current = self.current, engine
        self.swaps += 1
        return previous
