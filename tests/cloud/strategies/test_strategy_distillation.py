"""Distillation and CEMA's loss, whose targets are the teachers' predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategy_contexts import LineContext, step_of

from cloud.training.step import Settings
from cloud.training.strategies.cema import Cema, CemaSettings, terms
from cloud.training.strategies.distillation import Distillation

X = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.5, 3.0]])
TEACHERS = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])


def test_distillation_is_the_weighed_cross_entropy_to_the_teachers() -> None:
    context = LineContext([1.0, 2.0, 0.5], [0.0, 0.1, -0.1])
    strategy = Distillation(Settings())
    strategy.begin(context)
    z = X.numpy() * [1.0, 2.0, 0.5] + [0.0, 0.1, -0.1]
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    each = -(TEACHERS.numpy() * log_p).sum(1)
    loss = strategy.loss(step_of(context, X, teachers=TEACHERS, weights=torch.tensor([1.0, 3.0])))
    assert float(loss.detach()) == pytest.approx((each[0] + 3 * each[1]) / 2, rel=1e-5)
    assert strategy.released()[0].tolist() == [1.0, 2.0, 0.5]
    assert not strategy.after()


def test_cema_adds_entropy_divergence_and_label() -> None:
    context = LineContext([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    strategy = Cema(CemaSettings(alpha=3, beta=2, gamma=0.5))
    strategy.begin(context)
    z = X.numpy().astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    t = TEACHERS.numpy().astype(np.float64)
    own, teacher = -(p * np.log(p)).sum(1), -(t * np.log(t)).sum(1)
    threshold = 0.4 * math.log(3)
    weight = np.exp(threshold - teacher)
    divergence = (t * np.log(t / p)).sum(1)
    label = -np.log(p[range(2), t.argmax(1)])
    wanted = (3 * np.exp(threshold - own) * own + 2 * weight * divergence + 0.5 * weight * label).mean()
    assert float(strategy.loss(step_of(context, X, teachers=TEACHERS)).detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_weights_of_cema_are_capped_and_carry_no_gradient() -> None:
    logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
    own, divergence, label = terms(logits, torch.tensor([[0.0, 1.0]]), threshold=3.0, cap=2.0)
    assert float(divergence.detach()) == pytest.approx(40, rel=1e-4)
    assert float(label.detach()) == pytest.approx(40, rel=1e-4)
    assert float(own.detach()) == pytest.approx(0, abs=1e-5)
