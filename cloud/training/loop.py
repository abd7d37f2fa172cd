"""The loop that drives any strategy through the bundle's integers: gamma and beta learn, statistics are measured behind them.

    a step:  a group of uploads ─► answers ─► modifiers' weights ─► the strategy's loss + modifiers' terms ─► Adam ─► after()

Every `refresh` steps statistics are measured again, and how far to go along what was learnt is decided on held-back uploads,
both as the refold recipe does it. The methods' papers see each image once in a stream; here a group is drawn from what a
domain's devices have uploaded, without replacement until all were seen, for `steps` steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cloud.distil.recipe import Task, choose_share, held_back
from cloud.distil.settings import DistilSettings
from cloud.distil.student import Student
from cloud.training.context import StudentContext
from cloud.training.step import Modifier, Step, Strategy
from cloud.training.strategies.registry import make_modifiers, make_strategy
from refold.preprocess import Preprocess

__all__ = ["run_strategy", "sharpened"]

CHUNK = 256  # uploads that are float32 at once


def run_strategy(student: Student, preprocess: Preprocess, task: Task, settings: DistilSettings) -> dict[str, float]:
    """Moves the student's gamma and beta as `settings.recipe` says; it must be loaded with the states to start from.

    Returns:
        metrics: first and last losses, the mean weight of an image, and those of `recipe.choose_share`.

    Raises:
        UsageError: as `registry.check`.
        ModelError: a strategy needs features and the student has no linear layer, or calibration images and there are none.
    """
    generator = torch.Generator().manual_seed(task.seed)
    held = held_back(len(task.images), settings.held_back, generator)
    taught = np.setdiff1d(np.arange(len(task.images)), held)
    before = student.snapshot()
    strategy = make_strategy(settings.recipe, settings.modifiers, settings.options)
    modifiers: list[Modifier[Any]] = [
        m
        for m in make_modifiers(settings.recipe, settings.modifiers, settings.options, ("weights", "penalty"))
        if isinstance(m, Modifier)
    ]
    needs = strategy.needs.union(*(m.needs for m in modifiers))
    context = StudentContext(
        student,
        preprocess,
        task.calibration,
        task.targets.shape[1],
        generator,
        batch=settings.batch,
        features="features" in needs,
    )
    context.moments = task.measure()
    strategy.begin(context)
    for m in modifiers:
        m.begin(context)
    steps = _Steps(context, preprocess, task, needs, strategy.moved)
    losses, weights = [], []
    student.trainable(True)
    learning = [context.parameters[i] for i in strategy.trained(len(context.parameters))]
    optimiser = torch.optim.Adam(learning, strategy.settings.rate)
    groups = _groups(taught, settings.group, generator)
    for number in range(settings.steps):
        loss, weight = _step(strategy, modifiers, steps, next(groups), learning, optimiser)
        losses.append(loss)
        weights.append(weight)
        if weight and strategy.after():
            optimiser = torch.optim.Adam(learning, strategy.settings.rate)
        if (number + 1) % settings.refresh == 0:
            context.moments = task.measure()
    student.restore(strategy.released())
    student.trainable(False)
    tenth = max(len(losses) // 10, 1)
    metrics = {
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
        "mean_weight": float(np.mean(weights)),
    }
    return metrics | choose_share(student, preprocess, task, held, before, settings)


def sharpened(learning: list[Tensor], radius: float) -> list[Tensor]:
    """ρ g/‖g‖ for each tensor's gradient, the norm over all of them (sharpness-aware minimisation, Foret et al. 2021)."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    size = torch.sqrt(torch.stack([(g**2).sum() for g in gradients]).sum()) + 1e-12
    return [radius * g / size for g in gradients]


def _step(
    strategy: Strategy[Any],
    modifiers: list[Modifier[Any]],
    steps: _Steps,
    pick: np.ndarray[Any, np.dtype[np.int64]],
    learning: list[Tensor],
    optimiser: torch.optim.Optimizer,
) -> tuple[float, float]:
    """One step on the uploads `pick`; its loss, and the mean weight of an upload. Where none counts nothing moves."""
    step = steps.of(pick)
    weights = torch.ones(len(pick))
    for m in modifiers:
        if (found := m.weights(step)) is not None:
            weights = weights * found
    step = step.weighed(weights)
    if not weights.any():
        return 0.0, 0.0
    optimiser.zero_grad()
    loss = _loss(strategy, modifiers, step)
    loss.backward()  # type: ignore[no-untyped-call]
    if strategy.radius:
        kept = [p.detach().clone() for p in learning]
        with torch.no_grad():
            for p, up in zip(learning, sharpened(learning, strategy.radius), strict=True):
                p.add_(up)
        optimiser.zero_grad()
        _loss(strategy, modifiers, steps.again(step)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for p, k in zip(learning, kept, strict=True):
                p.copy_(k)
    optimiser.step()
    return float(loss.detach()), float(weights.mean())


def _loss(strategy: Strategy[Any], modifiers: list[Modifier[Any]], step: Step) -> Tensor:
    loss = strategy.loss(step)
    for m in modifiers:
        if (term := m.penalty(step)) is not None:
            loss = loss + term
    return loss


def _groups(
    taught: np.ndarray[Any, np.dtype[np.int64]], size: int, generator: torch.Generator
) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Upload numbers, `size` at a time, all of them before any comes again; without end."""
    size = min(size, len(taught))
    while True:
        order = taught[torch.randperm(len(taught), generator=generator).numpy()]
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


class _Steps:
    """Makes a `Step` of uploads: what the strategy and the modifiers need, and nothing else."""

    def __init__(self, context: StudentContext, preprocess: Preprocess, task: Task, needs: frozenset[str], moved: bool) -> None:
        self._context, self._preprocess, self._images = context, preprocess, task.images
        self._targets = torch.from_numpy(task.targets)
        self._needs, self._moved = needs, moved
        self._exported = self._exported_logits() if "exported" in needs else None

    def of(self, pick: np.ndarray[Any, np.dtype[np.int64]]) -> Step:
        plain = torch.from_numpy(self._preprocess.apply(self._images[pick]))
        x = self._context.augment(plain) if self._moved else plain
        return self._seen(x, self._targets[pick], self._exported[pick] if self._exported is not None else None)

    def again(self, step: Step) -> Step:
        """The same uploads with the parameters of now."""
        return self._seen(step.x, step.teachers, step.exported, again=True).weighed(step.weights)

    def _exported_logits(self) -> Tensor:
        """Of every upload, (N, classes): once, since the exported model does not change."""
        parts = [self._images[i : i + CHUNK] for i in range(0, len(self._images), CHUNK)]
        return torch.cat([self._context.exported_answers(torch.from_numpy(self._preprocess.apply(p))).logits for p in parts])

    def _seen(self, x: Tensor, teachers: Tensor, exported: Tensor | None, *, again: bool = False) -> Step:
        context = self._context
        replay = "replay" in self._needs and context.has_calibration
        return Step(
            x=x,
            student=context.look(x),
            teachers=teachers,
            exported=exported,
            augmented=context.look(context.augment(x)) if "augmented" in self._needs else None,
            replay=context.replay(len(x)) if replay else None,
            weights=torch.ones(len(x)),
            again=again,
        )
