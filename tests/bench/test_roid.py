"""ROID's arithmetic, term by term, and its second views."""

from __future__ import annotations

import math

import numpy as np
import torch
from adaptation_nets import small_net
from torch import nn

from bench.adaptation.nets import affine_parameters, to_input
from bench.adaptation.roid import (
    ROID,
    certainty_and_diversity,
    prior_correction,
    soft_likelihood_ratio,
    symmetric_cross_entropy,
)
from bench.adaptation.views import second_view


def images(count: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


def test_the_likelihood_ratio_keeps_a_gradient_where_entropy_has_none() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1]])
    expected = -sum(v * math.log(v / (1 - v) + 1e-5) for v in (0.7, 0.2, 0.1))
    assert math.isclose(float(soft_likelihood_ratio(p.log())), expected, rel_tol=1e-5)
    assert torch.isfinite(soft_likelihood_ratio(torch.tensor([[80.0, 0.0, 0.0]]))).all()


def test_symmetric_cross_entropy_is_symmetric_and_least_for_equals() -> None:
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.allclose(symmetric_cross_entropy(a, b), symmetric_cross_entropy(b, a))
    p, q = a.softmax(1), b.softmax(1)
    expected = -0.5 * ((p * q.log()).sum(1) + (q * p.log()).sum(1))
    assert torch.allclose(symmetric_cross_entropy(a, b), expected, atol=1e-5)


def test_weights_are_of_diverse_and_sure_predictions() -> None:
    logits = torch.tensor([[6.0, 0, 0], [6.0, 0, 0], [0, 6.0, 0], [0, 0.5, 0.4]])
    weight = certainty_and_diversity(logits, torch.tensor([0.8, 0.1, 0.1]), 1 / 3)
    assert weight[0] == weight[1] == 0  # what is always predicted
    assert weight[2] > weight[3] > 0  # rare and sure above rare and unsure
    assert math.isclose(float(weight[2]), math.exp(3.0), rel_tol=1e-3)


def test_the_prior_follows_the_batch_and_is_smoothed() -> None:
    logits = torch.zeros(4, 2)
    logits[:3, 0] = 4.0
    p = logits.softmax(1)
    prior = p.mean(0)
    smooth = max(1 / 4, 1 / 2) / prior.max()
    expected = p * (prior + smooth) / (1 + 2 * smooth)
    assert torch.allclose(prior_correction(logits).exp(), expected, atol=1e-6)
    assert prior_correction(logits)[3].argmax() == 0  # undecided: the more frequent class


def test_a_step_learns_and_the_source_pulls_back() -> None:
    x, labels = to_input(images()), torch.zeros(32, dtype=torch.int64)
    free, held = ROID(small_net(), lr=1e-2, source=0.0), ROID(small_net(), lr=1e-2, source=1.0)
    for method in (free, held):
        method.counts = {}
        for _ in range(3):
            method.step(x, labels)
    moved = [
        max(float((p.detach() - a).abs().max()) for p, a in zip(affine_parameters(m.net), m.anchor, strict=True))
        for m in (free, held)
    ]
    assert moved[0] > 1e-3 and moved[1] < 1e-7
    assert free.counts["frames_learnt_from"] > 0


def test_runs_are_repeatable_and_answer_every_frame() -> None:
    labels = np.zeros(50, np.int64)
    first, again = (ROID(small_net(), batch=16, seed=3).run(images(50), labels)[0] for _ in range(2))
    assert first.shape == (50,) and np.array_equal(first, again)


def test_a_batch_of_one_image_and_a_constant_one_stay_finite() -> None:
    method = ROID(small_net(), lr=1e-2)
    for x in (to_input(images(1)), to_input(np.full((4, 16, 16, 3), 7, np.uint8))):
        method.counts = {}
        assert torch.isfinite(method.step(x, torch.zeros(len(x), dtype=torch.int64))).all()
        assert all(torch.isfinite(p).all() for p in affine_parameters(method.net))
    assert isinstance(method.net, nn.Module)


def test_second_views_show_the_same_scene() -> None:
    """Drawn anew each time, in range, and nearer to their own image than to another one."""
    pictures = np.kron(np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    x, generator = to_input(pictures), torch.Generator().manual_seed(0)
    views = [second_view(x, generator) for _ in range(4)]
    assert not torch.equal(views[0], views[1]) and all(v.shape == x.shape for v in views)
    low, high = to_input(np.zeros((1, 2, 2, 3), np.uint8)), to_input(np.full((1, 2, 2, 3), 255, np.uint8))
    for view in views:
        assert (view >= low.amin((2, 3), keepdim=True) - 1e-5).all() and (view <= high.amax((2, 3), keepdim=True) + 1e-5).all()
