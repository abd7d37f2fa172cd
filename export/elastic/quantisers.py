"""Learned steps and zero points: a table for each form, a row for each bit-width.

What is learned is relative to the initial value, 1 + r for a step and o (of the code range) for a zero point: Adam moves every
number by about the learning rate whatever its size, and an 8-bit step is smaller than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from export.elastic.initial import EPS, subsample, zero_anchored
from export.elastic.rounding import Codes, activation_codes, elastic_round, integer_codes, weight_codes
from export.elastic.space import ActivationForm, WeightForm

__all__ = ["Bounds", "Table", "ValueQuantiser", "WeightQuantiser"]

SAMPLED = 4096  # numbers of a tensor, or of each channel times 16, that the first search looks at
UNBOUNDED = (-math.inf, math.inf)
Bounds = tuple[float, float]


@dataclass
class Table:
    """Steps and zero points of one form; each tensor float32 (bit-widths, rows).

    Attributes:
        base, zero: at the start.
        ratio, offset: learned around them, 0 at the start; offset is None where the zero point is fixed.
    """

    bits: tuple[int, ...]
    base: Tensor
    zero: Tensor
    ratio: Tensor
    offset: Tensor | None

    @classmethod
    def fitted(cls, x: Tensor, bits: Sequence[int], codes: Sequence[Codes], zeros: Sequence[int | None]) -> Table:
        """From x, float32 (rows, n), by the search of `export.elastic.initial`."""
        found = [zero_anchored(x, c, z) for c, z in zip(codes, zeros, strict=True)]
        base, zero = torch.stack([s for s, _ in found]), torch.stack([z for _, z in found])
        free = any(z is None for z in zeros)
        return cls(tuple(bits), base, zero, torch.zeros_like(base), torch.zeros_like(base) if free else None)

    def at(self, bits: int, codes: Codes) -> tuple[Tensor, Tensor]:
        """(step, zero point) for a bit-width, float32 (rows,). The zero point is not yet rounded; it stays among the codes."""
        row = self.bits.index(bits)
        step = (self.base[row] * (1 + self.ratio[row])).clamp(min=EPS)
        zero = self.zero[row]
        if self.offset is not None:
            zero = (zero + self.offset[row] * (codes.high - codes.low)).clamp(codes.low, codes.high)
        return step, zero

    def tensors(self) -> dict[str, Tensor]:
        held = {"base": self.base, "zero": self.zero, "ratio": self.ratio}
        return held if self.offset is None else {**held, "offset": self.offset}

    def learned(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.tensors().items() if k in ("ratio", "offset")}


class WeightQuantiser:
    """Of one layer; tables by (per_channel, symmetric)."""

    def __init__(self, tables: dict[tuple[bool, bool], Table]) -> None:
        self.tables = tables

    @classmethod
    def fitted(
        cls, weight: Tensor, bits: Sequence[int], granularities: Sequence[bool], symmetries: Sequence[bool]
    ) -> WeightQuantiser:
        tables = {}
        for per_channel in granularities:
            rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
            rows = subsample(rows.float(), SAMPLED // 16 if per_channel else SAMPLED)
            for symmetric in symmetries:
                codes = [weight_codes(b, symmetric) for b in bits]
                tables[per_channel, symmetric] = Table.fitted(rows, bits, codes, [0 if symmetric else None] * len(bits))
        return cls(tables)

    def _at(self, weight: Tensor, form: WeightForm) -> tuple[Tensor, Tensor, Codes]:
        codes = weight_codes(form.bits, form.symmetric)
        step, zero = self.tables[form.per_channel, form.symmetric].at(form.bits, codes)
        shape = (-1, *[1] * (weight.dim() - 1))
        return step.reshape(shape), zero.reshape(shape), codes

    def __call__(self, weight: Tensor, form: WeightForm) -> Tensor:
        """The weight as the engine sees it, differentiable."""
        step, zero, codes = self._at(weight, form)
        share = weight.numel() / weight.shape[1] if form.per_channel else weight.numel()
        gain = (2 if form.per_channel else 1) / math.sqrt(codes.high * share)
        return elastic_round(weight, step, zero, codes, gain)

    def codes(self, weight: Tensor, form: WeightForm) -> tuple[Tensor, Tensor]:
        """(q - z as int8, steps float32 (channels,))."""
        with torch.no_grad():
            step, zero, codes = self._at(weight, form)
            q = integer_codes(weight, step, zero.round(), codes)
            return q.to(torch.int8), step.flatten().expand(weight.shape[0]).clone()


class ValueQuantiser:
    """Of one value; tables by symmetry. A value that is never negative has zero point 0 in both, and one table.

    Attributes:
        bounds: of an activation function the producer absorbed: no code may stand for a number outside, so that a runtime may
            leave the function out.
    """

    def __init__(self, tables: dict[bool, Table], non_negative: bool, bounds: Bounds = UNBOUNDED) -> None:
        self.tables, self.non_negative, self.bounds = tables, non_negative, bounds

    @classmethod
    def fitted(
        cls, seen: Tensor, bits: Sequence[int], symmetries: Sequence[bool], non_negative: bool, bounds: Bounds = UNBOUNDED
    ) -> ValueQuantiser:
        """`seen`: float32 (n,), of calibration pictures."""
        rows, codes = seen.reshape(1, -1), [activation_codes(b) for b in bits]
        if non_negative:
            return cls({True: Table.fitted(rows, bits, codes, [0] * len(bits))}, True, bounds)
        middle = [2 ** (b - 1) for b in bits]
        return cls({s: Table.fitted(rows, bits, codes, middle if s else [None] * len(bits)) for s in symmetries}, False, bounds)

    def _at(self, form: ActivationForm) -> tuple[Tensor, Tensor, Codes]:
        codes = activation_codes(form.bits)
        step, zero = self.tables[self.non_negative or form.symmetric].at(form.bits, codes)
        whole = zero.detach().round()
        for bound, reach in ((self.bounds[1], codes.high - whole), (-self.bounds[0], whole)):
            if 0 < bound < math.inf:
                # A hair below bound / reach: rounded to float32 in whatever order, step * reach then stays within the bound.
                step = torch.minimum(step, bound * (1 - 2**-22) / reach.clamp_min(1))
        return step.squeeze(0), zero.squeeze(0), codes

    def __call__(self, x: Tensor, form: ActivationForm) -> Tensor:
        """x as its readers see it, differentiable."""
        step, zero, codes = self._at(form)
        return elastic_round(x, step, zero, codes, 1 / math.sqrt(codes.high * x.numel()))

    def scale(self, form: ActivationForm) -> tuple[float, int, int]:
        """(step, zero point, number of codes)."""
        with torch.no_grad():
            step, zero, codes = self._at(form)
            return float(step), int(zero.round()), codes.high + 1
