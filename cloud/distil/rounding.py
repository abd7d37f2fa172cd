"""Fake quantisation in four passes over memory: on a CPU torch's own kernel takes three times as long.

The values are those of `aten.fake_quantize_per_tensor_affine` (nearest even, clamped), the gradient is the straight-through
one: whole inside the range, none outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = ["fake_quantise", "quicken"]

SLOW = torch.ops.aten.fake_quantize_per_tensor_affine.default


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
        codes = (x * (1.0 / scale)).round_()
        if not ctx.needs_input_grad[0]:
            return codes.clamp_(low - zero_point, high - zero_point).mul_(scale)
        clamped = codes.clamp(low - zero_point, high - zero_point)
        ctx.save_for_backward(codes == clamped)
        return clamped.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None


def fake_quantise(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """x rounded to scale · (code − zero_point), codes in low..high; any shape, float32."""
    found: Tensor = _FakeQuantise.apply(x, scale, zero_point, low, high)  # type: ignore[no-untyped-call]
    return found


def quicken(network: torch.nn.Module) -> None:
    """Puts `fake_quantise` in the place of torch's in a program's graph; a network without a graph stays as it is."""
    if not isinstance(network, GraphModule):
        return
    for node in network.graph.nodes:
        if node.target is SLOW:
            node.target = fake_quantise
    network.recompile()
