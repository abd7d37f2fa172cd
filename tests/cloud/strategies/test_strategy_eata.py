"""EATA: which images count, the weighed entropy, and the Fisher anchor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategy_contexts import LineContext, step_of

from cloud.training.strategies.eata import Eata, EataSettings, MeanPrediction, fisher


def numbers(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return p, -(p * np.log(p)).sum(1)


def test_reliable_images_count_with_their_weights() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    strategy = Eata(EataSettings(cosine=2.0))
    strategy.begin(context)
    x = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 3.0]])
    _, h = numbers(x.numpy())
    e0 = 0.4 * math.log(2)
    assert (h < e0).tolist() == [True, False, True]
    wanted = (np.exp(e0 - h[[0, 2]]) * h[[0, 2]]).mean()
    assert float(strategy.loss(step_of(context, x)).detach()) == pytest.approx(wanted, rel=1e-5)
    unsure = strategy.loss(step_of(context, x[[1]]))
    assert float(unsure.detach()) == 0


def test_the_mean_of_kept_predictions_rules_out_what_is_like_it() -> None:
    mean = MeanPrediction(cosine=0.5)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert mean.unlike(p, torch.tensor([True, False])).tolist() == [True, False]
    assert mean.mean is not None
    assert mean.mean.tolist() == pytest.approx([0.9, 0.1])
    similar = [float(np.dot(v, [0.9, 0.1]) / np.linalg.norm(v) / np.linalg.norm([0.9, 0.1])) for v in p.numpy()]
    assert (similar[0] >= 0.5, similar[1] < 0.5) == (True, True)
    assert mean.unlike(p, torch.tensor([True, True])).tolist() == [False, True]
    assert mean.mean.tolist() == pytest.approx([0.9 * 0.9 + 0.1 * 0.2, 0.9 * 0.1 + 0.1 * 0.8])
    assert mean.unlike(p, torch.tensor([False, False])).tolist() == [False, False]
    assert mean.mean.tolist() == pytest.approx([0.83, 0.17])


def test_fisher_is_the_mean_square_of_the_gradients_of_batches() -> None:
    x = torch.cat([torch.tensor([[2.0, 1.0]]).repeat(64, 1), torch.tensor([[0.0, 1.0]]).repeat(64, 1)])
    context = LineContext([1.0, 1.0], [0.0, 0.0], x)
    p, _ = numbers(x.numpy()[[0, 64]])
    by_beta = p - np.array([[1.0, 0.0], [0.0, 1.0]])  # of the cross-entropy to the model's own label
    by_gamma = by_beta * x.numpy()[[0, 64]]
    found = fisher(context, 128)
    assert found[0].tolist() == pytest.approx((by_gamma**2).mean(0), rel=1e-5)
    assert found[1].tolist() == pytest.approx((by_beta**2).mean(0), rel=1e-5)
    assert [f.tolist() for f in fisher(LineContext([1.0, 1.0], [0.0, 0.0]), 128)] == [[0, 0], [0, 0]]


def test_the_anchor_pulls_by_fisher_information() -> None:
    x = torch.tensor([[2.0, 1.0]]).repeat(8, 1)
    context = LineContext([1.0, 1.0], [0.0, 0.0], x)
    strategy = Eata(EataSettings(anchor=5.0))
    strategy.begin(context)
    with torch.no_grad():
        context.parameters[1].add_(torch.tensor([0.5, 0.0]))
    unsure = torch.tensor([[0.0, 0.5]])  # counts for nothing: the anchor is left
    information = float(fisher(context, 8)[1][0])
    assert float(strategy.loss(step_of(context, unsure)).detach()) == pytest.approx(5 * information * 0.25, rel=1e-5)
