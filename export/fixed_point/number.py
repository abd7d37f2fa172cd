"""The number format <WL,FL>: what a value may be, and two ways of bringing a real number there.

    value = k * 2**-FL,  k an integer of WL bits           saturating, never wrapping
    nearest       k = round(x * 2**FL), half to even        tests, evaluation, the exported codes
    stochastic    k = floor(x * 2**FL + u), u in [0, 1)     training: right on average, so that small updates are not lost

(Kummer et al. 2021, arXiv 2107.13490; stochastic rounding as Gupta et al. 2015.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refold.errors import UsageError

__all__ = ["FixedPoint", "largest_fraction", "quantise"]

LONGEST = 32
FRACTIONS = range(-64, 65)  # float32 holds every step between these without leaving its normal numbers


@dataclass(frozen=True)
class FixedPoint:
    """<word, fraction>.

    Attributes:
        word: bits, 2..32, the sign's included.
        fraction: of these behind the binary point; may be negative or more than `word`.
        signed: two's complement; otherwise codes from 0 to 2**word - 1 (what an engine's unsigned activation codes hold).
        narrow: leave out the lowest code, so that every number can be negated: what a folded gamma < 0 does to a channel.

    Raises:
        UsageError: a word or fraction out of range.
    """

    word: int
    fraction: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.word <= LONGEST:
            raise UsageError(f"A fixed-point word has 2 to {LONGEST} bits, not {self.word}.")
        if self.fraction not in FRACTIONS:
            raise UsageError(f"A fixed-point fraction lies between {FRACTIONS[0]} and {FRACTIONS[-1]}, not at {self.fraction}.")

    def __str__(self) -> str:
        return f"<{self.word},{self.fraction}>{'' if self.signed else 'u'}"

    @property
    def step(self) -> float:
        return 2.0**-self.fraction

    @property
    def lowest_code(self) -> int:
        return (-(2 ** (self.word - 1)) + self.narrow) if self.signed else 0

    @property
    def highest_code(self) -> int:
        return int(2 ** (self.word - self.signed)) - 1

    @property
    def lowest(self) -> float:
        return self.lowest_code * self.step

    @property
    def highest(self) -> float:
        return self.highest_code * self.step

    @property
    def zero_point(self) -> int:
        """Of the unsigned codes an engine uses: half the range for signed numbers, else 0."""
        return 2 ** (self.word - 1) if self.signed else 0

    def nearest(self, x: Tensor) -> Tensor:
        """x float32, any shape, on the grid; ties go to the even code, as engines round.

        Words of more than 24 bits have codes that float32 does not hold: those are as near as float32 comes.
        """
        return self._saturated((x * 2.0**self.fraction).round())

    def stochastic(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x on the grid, up or down at random so that the mean is x (inside the range)."""
        scaled = x * 2.0**self.fraction
        below = scaled.floor()
        # floor(scaled + u) would round the sum in float32: comparing the remainder is exact.
        up = torch.rand(x.shape, generator=generator, device=x.device) < scaled - below
        return self._saturated(below + up)

    def _saturated(self, codes: Tensor) -> Tensor:
        return codes.clamp_(self.lowest_code, self.highest_code).mul_(self.step)

    def codes(self, x: NDArray[np.float32]) -> NDArray[np.int64]:
        """The integers of numbers that lie on the grid (others are rounded first)."""
        scaled = np.rint(x.astype(np.float64) * 2.0**self.fraction)
        return np.clip(scaled, self.lowest_code, self.highest_code).astype(np.int64)

    def holds(self, x: Tensor) -> bool:
        """Whether every value is one of the format's."""
        return bool(torch.equal(self.nearest(x), x))


def largest_fraction(word: int, largest: float, signed: bool = True) -> int:
    """The finest fraction at which a word still reaches `largest` (a magnitude), but for the last code's step.

    ceil(log2(largest)) bits stand before the point (fewer than none for small numbers), and one for the sign.
    """
    if not largest > 0 or not math.isfinite(largest):
        return word - signed
    mantissa, exponent = math.frexp(largest)  # the logarithm's own rounding would miss a power of two by one
    before = exponent - (mantissa == 0.5)
    return max(FRACTIONS[0], min(FRACTIONS[-1], word - signed - before))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, form: FixedPoint, generator: torch.Generator | None
    ) -> Tensor:
        ctx.save_for_backward((x >= form.lowest) & (x <= form.highest))
        return form.nearest(x) if generator is None else form.stochastic(x, generator)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * inside, None, None


def quantise(x: Tensor, form: FixedPoint, generator: torch.Generator | None = None) -> Tensor:
    """x on the grid of `form`, with the straight-through gradient: 1 inside the range, 0 where it saturated.

    Args:
        generator: of the stochastic rounding; None: round to nearest.
    """
    return _StraightThrough.apply(x, form, generator)  # type: ignore[no-any-return,no-untyped-call]
