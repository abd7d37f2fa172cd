"""The training of a supernet (quant.md §1.2), one step after the other:

    pictures ─► regularisation + high, random, low (each taught by the last) ─► clip by value ─► Adam, cosine to 0

What a step draws depends on the seed and its number alone, and a checkpoint holds every number that a step changes: a training
that was killed goes on to the very result it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.utils import clip_grad_value_

from export.elastic.data import Labelled, Split, augmented, order_of
from export.elastic.folder import Checkpoint, RunFolder, Training
from export.elastic.guidance import guide, sandwich
from export.elastic.regular import weight_distribution_loss
from export.elastic.space import Configuration
from export.elastic.supernet import Supernet
from export.interpret import float_parameters
from export.interpret import run as run_graph
from refold.errors import ModelError
from refold.preprocess import Preprocess

__all__ = ["Trainer", "calibration_index", "fixed_order", "statistics_index", "train"]

CLIP = 1.0  # of every gradient, by value
OnStep = Callable[[int, list[float]], None]
Order = Callable[[np.random.Generator], list[Configuration]]


def calibration_index(split: Split, training: Training) -> np.ndarray:
    """The training pictures that first steps are taken from."""
    return _drawn(split, training, training.calibration)


def statistics_index(split: Split, training: Training, judged: int) -> np.ndarray:
    """The training pictures that norm statistics are taken from: as many as are judged with them, up to `statistics`.

    256 of them cost ResNet-20 half a point at 8 bits, 2,048 a tenth; where 500 pictures judge, that is less than their noise.
    """
    return _drawn(split, training, max(training.calibration, min(training.statistics, judged)))


def _drawn(split: Split, training: Training, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng((training.seed, 3)).permutation(split.train)[:count])


def fixed_order(configuration: Configuration) -> Order:
    """Trains one configuration alone: what an elastic training is compared with."""
    return lambda rng: [configuration]


class Trainer:
    """A supernet with its optimiser, between two steps."""

    def __init__(self, supernet: Supernet, training: Training, order: Order | None = None) -> None:
        self.supernet, self.training, self.step = supernet, training, 0
        self.losses: list[list[float]] = []
        self.order = order or (lambda rng: sandwich(supernet.space, supernet.layout, rng, training.subnets))
        self.learned = list(supernet.learned().values())
        for tensor in self.learned:
            tensor.requires_grad_(True)
        self.optimiser = torch.optim.Adam(self.learned, lr=training.lr)
        self.float_parameters = float_parameters(supernet.captured) if training.teacher else None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes over the optimiser; the supernet was restored from the checkpoint's state."""
        self.step, self.losses = checkpoint.step, [list(row) for row in checkpoint.losses]
        if checkpoint.optimiser:
            self.optimiser.load_state_dict(dict(checkpoint.optimiser))

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.step, self.supernet.state(), self.optimiser.state_dict(), self.losses)

    def advance(self, data: Labelled, train: np.ndarray, preprocess: Preprocess) -> list[float]:
        """One step. Returns the subnets' losses and the regularisation.

        Raises:
            ModelError: a loss is no longer a number.
        """
        t = self.training
        rng = np.random.default_rng((t.seed, 4, self.step))
        index = order_of(train, t.batch, t.seed, self.step)
        images = data.read(index)
        x = torch.from_numpy(preprocess.apply(augmented(images, rng) if t.augment else images))
        y = torch.from_numpy(data.labels[index])
        for group in self.optimiser.param_groups:
            group["lr"] = t.lr * (1 + math.cos(math.pi * self.step / t.steps)) / 2
        self.optimiser.zero_grad(set_to_none=True)
        regular = weight_distribution_loss(self.supernet.regular_weights(), t.kurtosis, t.skewness)
        torch.autograd.backward(regular)
        losses = [*guide(self.supernet, x, y, self.order(rng), t.lam, self._taught(x)), float(regular.detach())]
        if not all(map(math.isfinite, losses)):
            raise ModelError(
                f"The training diverged at step {self.step}: a loss is no longer a number. Train again with a lower --lr.",
                code="diverged",
            )
        clip_grad_value_(self.learned, CLIP)
        self.optimiser.step()
        self.step += 1
        self.losses.append(losses)
        return losses

    def _taught(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.float_parameters is None:
            return None
        with torch.no_grad():
            return run_graph(self.supernet.captured, x, self.float_parameters)


def train(
    trainer: Trainer,
    data: Labelled,
    split: Split,
    preprocess: Preprocess,
    run: RunFolder | None = None,
    on_step: OnStep = lambda step, losses: None,
) -> None:
    """All steps that are left; a checkpoint every `checkpoint_every`, and at the end.

    Raises:
        ModelError: the training diverged; the last checkpoint stays.
        StorageError: a checkpoint cannot be written.
    """
    t = trainer.training
    while trainer.step < t.steps:
        losses = trainer.advance(data, split.train, preprocess)
        if run is not None and (trainer.step % t.checkpoint_every == 0 or trainer.step == t.steps):
            run.save(trainer.checkpoint())
        on_step(trainer.step, losses)
    for tensor in trainer.learned:
        tensor.requires_grad_(False)
