"""SAR: reliable images twice over, the way back, the norms that stay, and the sharpness-aware step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategy_contexts import LineContext, step_of

from cloud.training.loop import sharpened
from cloud.training.strategies.sar import Sar, SarSettings


def entropies(z: np.ndarray) -> np.ndarray:
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1)


def test_only_images_that_are_reliable_both_times_count_the_second_time() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    strategy = Sar(SarSettings())
    strategy.begin(context)
    assert strategy.radius == 0.05
    x = torch.tensor([[3.0, 0.0], [2.5, 0.0], [0.1, 0.0]])
    h = entropies(x.numpy())
    assert (h < 0.4 * math.log(2)).tolist() == [True, True, False]
    assert float(strategy.loss(step_of(context, x)).detach()) == pytest.approx(h[:2].mean(), rel=1e-5)
    moved = torch.tensor([[3.0, 0.0], [0.5, 0.0], [9.0, 0.0]])
    again = strategy.loss(step_of(context, moved, again=True))
    assert float(again.detach()) == pytest.approx(entropies(moved.numpy())[0], rel=1e-5)


def test_a_collapsed_model_goes_back_to_the_exported_values() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    strategy = Sar(SarSettings(collapsed=0.2))
    strategy.begin(context)
    floor = 0.2 * math.log(2) / math.log(1000)
    with torch.no_grad():
        context.parameters[0].add_(1.0)
    assert not strategy.after(), "nothing was judged yet"

    def judged(x: float) -> bool:
        for again in (False, True):
            strategy.loss(step_of(context, torch.tensor([[x, 0.0]]), again=again))
        return strategy.after()

    assert not judged(1.5)  # logits 3 and 0
    moving, rounds = float(entropies(np.array([[3.0, 0.0]]))[0]), 0
    while moving >= floor:
        moving, rounds = 0.9 * moving, rounds + 1
    assert [judged(30.0) for _ in range(rounds)] == [False] * (rounds - 1) + [True]
    assert context.parameters[0].tolist() == [1.0, 1.0]


def test_the_last_norms_stay() -> None:
    assert list(Sar(SarSettings(skipped=0.25)).trained(8)) == [0, 1, 2, 3, 4, 5]
    assert list(Sar(SarSettings(skipped=1.0)).trained(8)) == [0]


def test_a_sharpness_aware_step_climbs_along_the_gradient_of_all_parameters() -> None:
    a, b, still = (torch.tensor(v) for v in ([3.0, 0.0], [4.0], [1.0]))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    found = sharpened([a, b, still], 0.5)
    assert [f.tolist() for f in found] == [pytest.approx([0.3, 0.0]), pytest.approx([0.4]), [0.0]]
