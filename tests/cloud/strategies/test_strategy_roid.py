"""ROID: weights by diversity and certainty, the loss of both views, and the pull to the source."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategy_contexts import LineContext, step_of

from cloud.training.strategies.roid import Roid, RoidSettings, diversity_weight

X = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.1, 0.0]])


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def weights(z: np.ndarray, mean: np.ndarray, temperature: float) -> np.ndarray:
    p = softmax(z)
    diversity = 1 - (p @ mean) / np.linalg.norm(p, axis=1) / np.linalg.norm(mean)
    certainty = (p * np.log(p)).sum(1)
    diversity, certainty = ((v - v.min()) / (v.max() - v.min()) for v in (diversity, certainty))
    return np.where(diversity < diversity.mean(), 0, np.exp(diversity * certainty / temperature))


def test_weights_are_those_of_the_formula() -> None:
    mean = np.full(3, 1 / 3)
    found = diversity_weight(X, torch.from_numpy(mean).float(), 1 / 3)
    assert found.tolist() == pytest.approx(weights(X.numpy().astype(float), mean, 1 / 3), rel=1e-4)
    assert found.max() == pytest.approx(np.exp(3), rel=1e-4)  # the most diverse image is the most certain one


def test_the_loss_weighs_both_terms_and_the_mean_prediction_follows() -> None:
    context = LineContext([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    strategy = Roid(RoidSettings())
    strategy.begin(context)
    z, other = X.numpy().astype(float), X.numpy() + np.arange(3)
    p, q = softmax(z), softmax(other)
    clipped = p.clip(max=0.99)
    ratio = -(clipped * np.log(clipped / (1 - clipped) + 1e-5)).sum(1)
    symmetric = -0.5 * ((q * np.log(p)).sum(1) + (p * np.log(q)).sum(1))
    mean = np.full(3, 1 / 3)
    for _ in range(2):
        wanted = (weights(z, mean, 1 / 3) * (ratio + symmetric)).mean()
        assert float(strategy.loss(step_of(context, X)).detach()) == pytest.approx(wanted, rel=1e-4)
        mean = 0.9 * mean + 0.1 * p.mean(0)


def test_one_percent_of_the_source_comes_back_after_a_step() -> None:
    context = LineContext([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    strategy = Roid(RoidSettings(pull=0.01))
    strategy.begin(context)
    with torch.no_grad():
        context.parameters[0].fill_(3.0)
    assert not strategy.after()
    assert context.parameters[0].tolist() == pytest.approx([2.98] * 3)
