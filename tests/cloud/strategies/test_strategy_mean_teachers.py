"""CoTTA, RMT and PETAL: what the mean teacher says, what goes back, and what is released."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategy_contexts import LineContext, step_of

from cloud.training.strategies.cotta import Cotta, CottaSettings
from cloud.training.strategies.petal import Petal, PetalSettings, least_informed, posterior
from cloud.training.strategies.rmt import Rmt, RmtSettings, contrast, prototypes

X = torch.tensor([[3.0, 0.0], [0.0, 2.0]])


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def cross(q: np.ndarray, z: np.ndarray) -> np.ndarray:
    return -(q * np.log(softmax(z))).sum(1)


def test_cotta_follows_one_view_where_the_exported_model_is_sure_and_many_where_it_is_not() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    x = X.numpy()
    confidence = softmax(x).max(1).mean()
    sure = Cotta(CottaSettings(sure=confidence - 0.01, views=2))
    sure.begin(context)
    assert float(sure.loss(step_of(context, X)).detach()) == pytest.approx(cross(softmax(x), x).mean(), rel=1e-5)
    assert context.shown == 0
    unsure = Cotta(CottaSettings(sure=confidence + 0.01, views=2))
    unsure.begin(context)
    views = x + 0.75 * np.arange(2)  # the mean of 0.5 and 1 times the class number
    assert float(unsure.loss(step_of(context, X)).detach()) == pytest.approx(cross(softmax(views), x).mean(), rel=1e-5)


def test_cotta_restores_at_random_and_releases_the_average() -> None:
    context = LineContext([1.0] * 500, [0.0] * 500)
    strategy = Cotta(CottaSettings(momentum=0.75, restored=0.2))
    strategy.begin(context)
    with torch.no_grad():
        context.parameters[0].add_(1.0)
    strategy.after()
    assert strategy.released()[0].tolist() == pytest.approx([1.25] * 500)
    back = float((context.parameters[0] == 1.0).float().mean())
    assert 0.14 < back < 0.26
    assert set(context.parameters[0].tolist()) == {1.0, 2.0}


def test_the_contrast_is_that_of_a_double_loop() -> None:
    views = torch.tensor(np.random.default_rng(0).normal(size=(3, 2, 4)), dtype=torch.float64)
    z = (views / views.norm(dim=2, keepdim=True)).reshape(6, 4).numpy()
    total = 0.0
    for i in range(6):
        others = sum(math.exp(z[i] @ z[k] / 0.1) for k in range(6) if k != i)
        total -= sum(math.log(math.exp(z[i] @ z[j] / 0.1) / others) for j in range(6) if j != i and j % 2 == i % 2) / 2
    assert float(contrast(views, 0.1)) == pytest.approx(total / 6, rel=1e-9)


def test_prototypes_are_means_of_the_classes_met() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    targets = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.1, 0.9], [1.0, 0.0, 0.0]])
    assert prototypes(features, targets).tolist() == [[0.0, 5.0], [2.0, 0.0]]


def test_rmt_is_the_sum_of_its_terms() -> None:
    calibration = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    context = LineContext([1.0, 1.0], [0.0, 0.0], calibration)
    bare, whole = Rmt(RmtSettings(contrast=0, replay=0)), Rmt(RmtSettings(contrast=2.0, replay=3.0))
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    losses = []
    for strategy in (bare, whole):
        strategy.begin(context)
        step = step_of(context, X, replay=(context.look(calibration), targets))
        losses.append(float(strategy.loss(step).detach()))
    x, other = X.numpy(), X.numpy() + np.arange(2)

    def symmetric(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return 0.5 * cross(softmax(b), a) + 0.5 * cross(softmax(a), b)

    assert losses[0] == pytest.approx(0.5 * symmetric(x, x).mean() + 0.5 * symmetric(other, x).mean(), rel=1e-5)
    views = torch.stack([calibration, X, X + torch.arange(2)])  # each image's nearest prototype is its own class's
    added = 2 * float(contrast(views, 0.1)) + 3 * cross(targets.numpy(), calibration.numpy()).mean()
    assert losses[1] - losses[0] == pytest.approx(added, rel=1e-4)


def test_rmt_without_calibration_images_has_no_prototypes_and_no_replay() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    strategy = Rmt(RmtSettings())
    strategy.begin(context)
    assert torch.isfinite(strategy.loss(step_of(context, X)))
    with torch.no_grad():
        context.parameters[0].add_(1.0)
    assert not strategy.after()
    assert strategy.released()[0].tolist() == [2.0, 2.0]


def test_the_posterior_is_that_of_sgd_on_calibration_images() -> None:
    x = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    context = LineContext([1.0, 1.0], [0.0, 0.0], x)
    still, none = posterior(context, 3, 0.0)
    assert still[0].tolist() == [1.0, 1.0]
    assert none[0].tolist() == [0.0, 0.0]
    mean, variance = posterior(context, 2, 0.1)
    beta = np.zeros(2)
    gamma = np.ones(2)
    path = []
    for _ in range(2):
        p = softmax(np.array([1.0, 0.0]) * gamma + beta)
        g = p - np.array([1.0, 0.0])
        gamma, beta = gamma - 0.1 * g * np.array([1.0, 0.0]), beta - 0.1 * g
        path.append(beta)
    assert mean[1].tolist() == pytest.approx(np.mean(path, 0), rel=1e-5)
    assert variance[1].tolist() == pytest.approx(np.var(path, 0), rel=1e-2, abs=1e-6)
    unknown, width = posterior(LineContext([1.0, 1.0], [0.0, 0.0]), 3, 0.1)
    assert unknown[0].tolist() == [1.0, 1.0]
    assert width[0].tolist() == [0.0, 0.0]


def test_petal_has_a_gaussian_prior_around_the_posterior_mean() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    strategy = Petal(PetalSettings(prior=1e-3))
    strategy.begin(context)
    with torch.no_grad():
        context.parameters[1].add_(torch.tensor([0.002, 0.0]))
    taught = cross(softmax(X.numpy()), X.numpy() + np.array([0.002, 0.0])).mean()
    wanted = taught + 1e-3 * 0.5 * 0.002**2 / 1e-6
    assert float(strategy.loss(step_of(context, X)).detach()) == pytest.approx(wanted, rel=1e-4)


def test_petal_restores_where_gradients_are_least() -> None:
    gradients = [torch.tensor([0.1, -3.0]), torch.tensor([2.0, 0.2])]
    assert [m.tolist() for m in least_informed(gradients, 0.5)] == [[True, False], [False, True]]
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    strategy = Petal(PetalSettings(momentum=0.5, restored=0.5))
    strategy.begin(context)
    with torch.no_grad():
        for p in context.parameters:
            p.add_(1.0)
    for p, g in zip(context.parameters, gradients, strict=True):
        p.grad = g
    strategy.after()
    assert [p.tolist() for p in context.parameters] == [[1.0, 2.0], [1.0, 0.0]]
    assert [p.tolist() for p in strategy.released()] == [[1.5, 1.5], [0.5, 0.5]]
