"""The elastic quantiser, as one differentiable function.

    q = clip(round(x / s) + z, low, high)        x' = s (q - z)                      (EQ-Net eq. 1, integer zero point)

Rounding passes gradients straight through (Bengio et al. 2013), which makes the relaxed function x' = x inside the range and
s (bound - z) outside of it. The step's gradient is LSQ's (Esser et al. 2020): it keeps the rounding error as a constant.

    ∂x'/∂x = 1 inside, 0 outside
    ∂x'/∂s = (q - z) - x/s inside, bound - z outside
    ∂x'/∂z = 0 inside, -s outside
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_CODE", "Codes", "activation_codes", "elastic_round", "integer_codes", "weight_codes"]

MAX_CODE = 127  # an int8 weight code without its zero point


@dataclass(frozen=True)
class Codes:
    """low..high: the codes there are; reach: largest |q - z|."""

    low: int
    high: int
    reach: int

    def bounds(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return (z - self.reach).clamp_min(self.low), (z + self.reach).clamp_max(self.high)


def weight_codes(bits: int, symmetric: bool) -> Codes:
    """±(2^(b-1) - 1) where symmetric (a channel can be negated), -2^(b-1)..2^(b-1) - 1 otherwise; q - z always fits int8."""
    top = 2 ** (bits - 1) - 1
    return Codes(-top, top, MAX_CODE) if symmetric else Codes(-top - 1, top, MAX_CODE)


def activation_codes(bits: int) -> Codes:
    """0..2^b - 1."""
    return Codes(0, 2**bits - 1, 255)


def integer_codes(x: Tensor, s: Tensor, z: Tensor, codes: Codes) -> Tensor:
    """q - z as float; z integral. The division is a multiplication by 1/s, as in torch's own fake quantisation."""
    low, high = codes.bounds(z)
    q = torch.round(x * s.reciprocal()) + z
    return torch.minimum(torch.maximum(q, low), high) - z


class _ElasticRound(torch.autograd.Function):
    """Keeps only x, s and z for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, z: Tensor, codes: Codes, scale: float) -> Tensor:
        ctx.save_for_backward(x, s, z)
        ctx.codes, ctx.scale = codes, scale
        return integer_codes(x, s, z.round(), codes) * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, z = ctx.saved_tensors
        g, whole = grads[0], z.round()
        low, high = ctx.codes.bounds(whole)
        v = x * s.reciprocal()
        q = torch.round(v).add_(whole)
        inside = (q >= low) & (q <= high)
        level = torch.minimum(torch.maximum(q, low), high).sub_(whole)
        ds = _summed(g * (level - v * inside), s) * ctx.scale
        dz = _summed(g * ~inside * -s, z) * ctx.scale if ctx.needs_input_grad[2] else None
        return g * inside, ds, dz, None, None


def _summed(full: Tensor, like: Tensor) -> Tensor:
    """The gradient of a broadcast tensor."""
    if like.dim() == 0:
        return full.sum()
    axes = [i for i, size in enumerate(like.shape) if size == 1]
    return full.sum(axes, keepdim=True) if axes else full


def elastic_round(x: Tensor, s: Tensor, z: Tensor, codes: Codes, gradient_scale: float) -> Tensor:
    """x', differentiable in x, s and z.

    Args:
        x: float32, any shape.
        s: positive step; a scalar, or of x's rank with size 1 where it is shared.
        z: zero point, of s's shape; rounded here (straight through). 0 must lie in low..high for z, so that 0 is represented.
        gradient_scale: multiplies the gradients of s and z, and nothing else (LSQ).
    """
    return _ElasticRound.apply(x, s, z, codes, gradient_scale)  # type: ignore[no-any-return,no-untyped-call]
