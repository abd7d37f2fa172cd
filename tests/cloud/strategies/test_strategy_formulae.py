"""The shared formulae against values worked out by hand or in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cloud.training.strategies import formulae

LOGITS = arrays(np.float64, (3, 4), elements=st.floats(-6, 6, width=32))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_reliable_entropies_lie_below_a_share_of_the_largest() -> None:
    assert formulae.reliable_below(10) == pytest.approx(0.921034, abs=1e-6)
    assert formulae.reliable_below(1000) == pytest.approx(2.763102, abs=1e-6)
    assert formulae.reliable_below(1) == pytest.approx(0.4 * math.log(2))


def test_the_entropy_of_an_even_prediction_is_ln_c() -> None:
    assert formulae.entropy(torch.zeros(2, 8)).tolist() == pytest.approx([math.log(8)] * 2)


@given(LOGITS, LOGITS)
def test_entropies_are_those_of_numpy(a: np.ndarray, b: np.ndarray) -> None:
    p, q = softmax(a), softmax(b)
    one, two = torch.from_numpy(a), torch.from_numpy(b)
    assert np.allclose(formulae.entropy(one), -(p * np.log(p)).sum(1), atol=1e-9)
    assert np.allclose(formulae.cross_entropy(torch.from_numpy(q), one), -(q * np.log(p)).sum(1), atol=1e-9)
    both = -0.5 * (q * np.log(p)).sum(1) - 0.5 * (p * np.log(q)).sum(1)
    assert np.allclose(formulae.symmetric_cross_entropy(one, two), both, atol=1e-9)
    assert np.allclose(formulae.symmetric_cross_entropy(two, one), both, atol=1e-9)


def test_the_soft_likelihood_ratio_of_an_even_pair_is_zero_and_is_clipped_above() -> None:
    even = torch.log(torch.tensor([[0.5, 0.5]]))
    assert float(formulae.soft_likelihood_ratio(even)) == pytest.approx(-math.log(1 + 1e-5), abs=1e-7)
    two = torch.log(torch.tensor([[0.8, 0.2]]))
    assert float(formulae.soft_likelihood_ratio(two)) == pytest.approx(-(0.8 * math.log(4) + 0.2 * math.log(0.25)), abs=1e-4)
    sure = torch.tensor([[30.0, 0.0]], requires_grad=True)
    formulae.soft_likelihood_ratio(sure).sum().backward()
    assert sure.grad is not None
    assert float(sure.grad.abs().max()) < 1e-6


def test_a_weight_is_one_at_the_threshold_capped_and_without_gradient() -> None:
    h = torch.tensor([0.0, 0.9, 1.9], requires_grad=True)
    weight = formulae.confidence_weight(h, 0.9, cap=2.0)
    assert weight.tolist() == pytest.approx([2.0, 1.0, math.exp(-1)])
    assert not weight.requires_grad


def test_values_are_scaled_to_their_range() -> None:
    assert formulae.unit_range(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert formulae.unit_range(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


def test_distances_and_averages() -> None:
    a, b = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([0.0, 0.0]), torch.tensor([1.0])]
    assert float(formulae.squared_distance(a, b, [torch.tensor([1.0, 0.5]), torch.tensor([2.0])])) == 1 + 2 + 8
    formulae.follow_average(b, a, 0.75)
    assert b[0].tolist() == [0.25, 0.5]
    assert b[1].tolist() == [1.5]
