"""The quick fake quantisation against torch's own: the same values, the same gradients, and in the place of it in programs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cloud.distil.rounding import SLOW, fake_quantise, quicken


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2.0**-12, 8.0, width=32),
    zero_point=st.integers(0, 255),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31 - 1),
)
def test_values_and_gradients_are_torchs_own(scale: float, zero_point: int, bits: int, seed: int) -> None:
    high = 2**bits - 1
    zero_point = min(zero_point, high)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(500, generator=generator) * 100 * scale).requires_grad_(True)
    weight = torch.randn(500, generator=generator)
    mine, torchs = (
        fake_quantise(x, scale, zero_point, 0, high),
        torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, high),
    )
    assert torch.equal(mine, torchs)
    gradients = [torch.autograd.grad(y, x, weight)[0] for y in (mine, torchs)]
    assert torch.equal(*gradients)


def test_nothing_is_kept_for_a_gradient_nobody_wants() -> None:
    assert not fake_quantise(torch.randn(4), 0.1, 0, 0, 255).requires_grad


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return SLOW(x, 0.1, 3, 0, 255) * 2  # type: ignore[no-any-return]


def test_a_program_rounds_quickly_and_says_the_same() -> None:
    module = torch.fx.symbolic_trace(Rounded())
    x = torch.randn(64)
    wanted = module(x)
    assert any(n.target is SLOW for n in module.graph.nodes)
    quicken(module)
    assert not any(n.target is SLOW for n in module.graph.nodes)
    assert torch.equal(module(x), wanted)


@pytest.mark.parametrize("network", [nn.Linear(2, 2), nn.Sequential()])
def test_a_network_without_a_graph_is_left_alone(network: nn.Module) -> None:
    quicken(network)
