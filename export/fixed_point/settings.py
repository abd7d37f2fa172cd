"""What a fixed-point training may be told. Defaults are the paper's published configuration; `for_integers` is ours."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from export.fixed_point.precision import Bounds
from refold.errors import UsageError

__all__ = ["Settings", "as_published", "for_integers", "in_float32"]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters (arXiv 2107.13490 and its authors' configurations; docs/guide/fixed-point.md says which and why).

    Attributes:
        epochs: passes over the pictures.
        batch: pictures in one forward pass.
        accumulation: forward passes in one optimiser step.
        learning_rate: of momentum SGD; with unit gradients it is the length of a tensor's step.
        momentum: of SGD.
        weight_decay: L2, on every parameter.
        l1: weight of the sum of magnitudes in the loss: what makes exact zeros.
        patience, threshold, decay: the plateau schedule: after `patience` epochs without a relative improvement of the loss by
            `threshold`, the rate is multiplied by `decay`.
        word, fraction: where every weight tensor starts; fraction None: the finest at which the word holds its weights.
        longest, buffer: see `export.fixed_point.precision.Bounds`.
        lookback: fewest and most steps between two switches of a tensor.
        lookback_momentum: how fast the lookback follows the gradients' diversity.
        resolution: fewest and most bins of the push-down's histogram.
        tolerance: nats of divergence a push-down may cost; 0 is the paper's "not > 0".
        progress: standard errors by which the mean loss must rise before switches grow more eager; None: as published, one
            step's loss against a mean (`export.fixed_point.precision.next_strategy`).
        unit_gradients: divide each tensor's gradient by its norm.
        quantise_gradients: round gradients stochastically to the weight's format before that.
        activation_word: bits of every activation an engine holds as codes, its fraction chosen by what passes through; None:
            activations have the format of the layer that makes them, as in the paper, and layers run in float on a device.
        vector_word: bits of biases, gammas and betas; None: the word of the weight tensor before them, as in the paper. Engines
            hold them in 32 bits either way.
        stochastic_activations: round activations at random in training, as the paper does.
        refresh: steps between two looks at the fractions of activations.
        statistics_momentum: of the running mean and variance.
        power_of_two: let every folded norm scale by a power of two, as a target that shifts will (`refold.norms`).
        from_scratch: start at random weights (truncated normal, variance 1/2 over the fan-in) instead of the model's own.
        augment: mirror at random, and shift by up to an eighth of the side.
        float32: train in float32 with everything else alike: the baseline.
        seed: of the order, the augmentation and every rounding.

    Raises:
        UsageError: naming the setting.
    """

    epochs: int = 100
    batch: int = 512
    accumulation: int = 4
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    l1: float = 1e-4
    patience: int = 10
    threshold: float = 1e-6
    decay: float = 0.1
    word: int = 8
    fraction: int | None = 4
    longest: int = 32
    buffer: int | None = 8
    lookback: tuple[int, int] = (25, 100)
    lookback_momentum: float = 0.33
    resolution: tuple[int, int] = (50, 150)
    tolerance: float = 1e-3
    progress: float | None = None
    unit_gradients: bool = True
    quantise_gradients: bool = True
    activation_word: int | None = None
    vector_word: int | None = None
    stochastic_activations: bool = True
    refresh: int = 25
    statistics_momentum: float = 0.1
    power_of_two: bool = False
    from_scratch: bool = False
    augment: bool = False
    float32: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._need(_fits(getattr(self, field.name), str(field.type)), field.name, KINDS[str(field.type)])
        for name in ("epochs", "batch", "accumulation", "patience", "refresh"):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "decay", "statistics_momentum", "lookback_momentum"):
            self._need(0 < getattr(self, name) <= 1, name, "above 0 and at most 1")
        for name in ("momentum", "weight_decay", "l1", "threshold", "tolerance"):
            value = getattr(self, name)
            self._need(math.isfinite(value) and value >= 0, name, "0 or more")
        self._need(self.momentum < 1, "momentum", "under 1")
        finite = self.progress is None or (math.isfinite(self.progress) and self.progress >= 0)
        self._need(finite, "progress", "0 or more, or none")
        for name in ("lookback", "resolution"):
            low, high = getattr(self, name)
            self._need(1 <= low <= high, name, "two numbers from 1 on, the smaller first")
        self._need(self.resolution[0] >= 2, "resolution", "at least 2 bins")
        self._need(2 <= self.longest <= 32, "longest", "2 to 32 bits")
        self._need(2 <= self.word <= self.longest, "word", f"2 to {self.longest} bits")
        self._need(self.fraction is None or -32 <= self.fraction <= 32, "fraction", "-32 to 32, or measured")
        self._need(self.buffer is None or 0 <= self.buffer < self.longest, "buffer", f"0 to {self.longest - 1}, or measured")
        self._need(self.activation_word is None or 2 <= self.activation_word <= 16, "activation_word", "2 to 16 bits")
        self._need(self.vector_word is None or 2 <= self.vector_word <= 32, "vector_word", "2 to 32 bits")
        self._need(0 <= self.seed < 2**31, "seed", "0 to 2^31 - 1")

    def _need(self, good: bool, name: str, wanted: str) -> None:
        if not good:
            raise UsageError(f"{name} is {getattr(self, name)}; it must be {wanted}.")

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.longest, self.buffer)

    def encode(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def decode(cls, values: dict[str, Any]) -> Settings:
        """Raises UsageError when a name is unknown (a checkpoint of another version)."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(values) - known:
            raise UsageError(f"This version knows no setting {sorted(set(values) - known)[0]!r}.")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)


KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "int | None": "a whole number or none",
    "float | None": "a number or none", "tuple[int, int]": "two whole numbers",
}  # fmt: skip


def _fits(value: Any, kind: str) -> bool:
    if kind == "tuple[int, int]":
        return isinstance(value, tuple) and len(value) == 2 and all(_fits(v, "int") for v in value)
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind.startswith("float"):
        return isinstance(value, (int, float)) or (value is None and kind == "float | None")
    return isinstance(value, int) or (value is None and kind == "int | None")


def as_published(**changed: Any) -> Settings:
    """The paper's configuration; from trained weights it starts at <16,8>, because <8,4> rounds these to nothing."""
    start = {} if changed.get("from_scratch") else {"word": 16, "fraction": 8}
    return Settings(**{**start, **changed})


def for_integers(longest: int = 8, **changed: Any) -> Settings:
    """What ends as codes of an integer engine.

    The paper's words keep 8 bits above their fraction and so never have fewer than 12: no integer kernel takes them. Here a
    word has at most `longest` bits (7 for x86 without VNNI) and as many above the fraction as its weights need; activations are
    the engine's 8-bit codes, rounded as it rounds them; biases and norms keep the 16 bits that cost an engine nothing. A
    histogram of 150 bins cannot be kept by 8 bits (256 levels): with 20 to 50 bins and 0.02 nats, words of 5 to 7 bits pass.
    """
    ours: dict[str, Any] = {
        "longest": longest,
        "word": min(8, longest),
        "fraction": None,
        "buffer": None,
        "resolution": (20, 50),
        "tolerance": 0.02,
        "progress": 2.0,
        "activation_word": 8,
        "vector_word": 16,
        "stochastic_activations": False,
        "quantise_gradients": False,
        "l1": 1e-5,
    }
    return Settings(**{**ours, **changed})


def in_float32(settings: Settings) -> Settings:
    """The same training without a quantiser."""
    return dataclasses.replace(settings, float32=True)
