"""What strategies are given to work with, made of a bundle's student: `cloud.training.step.Context`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cloud.distil.augment import flip_and_move
from cloud.distil.norm_mode import Moments
from cloud.distil.recipe import Calibration
from cloud.distil.student import Student
from cloud.training.step import Answers
from refold.errors import ModelError
from refold.preprocess import Preprocess

__all__ = ["StudentContext"]

LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)


class _LastLinear(TorchFunctionMode):
    """Notes what goes into the last linear layer of a forward pass."""

    features: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in LINEAR:
            self.features = args[0]
        return func(*args, **(kwargs or {}))


class StudentContext:
    """See `cloud.training.step.Context`.

    Args:
        student: loaded with the states to start from.
        preprocess: the bundle's.
        calibration: its calibration slice.
        classes: how many.
        generator: of everything random.
        batch: images per forward pass without gradient; bounds memory.
        features: whether answers carry features.
    """

    def __init__(
        self,
        student: Student,
        preprocess: Preprocess,
        calibration: Calibration,
        classes: int,
        generator: torch.Generator,
        *,
        batch: int,
        features: bool,
    ) -> None:
        self.classes, self.generator = classes, generator
        self._student, self._preprocess, self._batch, self._wants_features = student, preprocess, batch, features
        self._images = calibration.images
        self._targets = (
            calibration.targets(student, preprocess, classes) if len(calibration.images) else torch.zeros(0, classes)
        )
        self._source = student.exported_moments()
        self.parameters = student.parameters
        self.exported = student.exported_values()
        self.moments: Sequence[Moments] = self._source

    def calibration(self, count: int) -> tuple[Tensor, Tensor]:
        return self._picked(slice(0, count))

    def replay(self, count: int) -> tuple[Answers, Tensor]:
        """The student's answers for `count` random calibration images behind the exported statistics, with gradient;
        targets."""
        x, targets = self._picked(torch.randint(0, len(self._images), (count,), generator=self.generator).numpy())
        return self._run(x, self._source), targets

    @property
    def has_calibration(self) -> bool:
        return len(self._images) > 0

    def look(self, x: Tensor) -> Answers:
        """The student's answers behind the domain's statistics, with gradient."""
        return self._run(x, self.moments)

    def answers(self, x: Tensor, values: Sequence[Tensor]) -> Answers:
        return self._without_gradient(x, values, self.moments)

    def exported_answers(self, x: Tensor) -> Answers:
        return self._without_gradient(x, self.exported, self._source)

    def exported_gradients(self, x: Tensor, loss: Callable[[Tensor], Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        for p in self.parameters:
            p.requires_grad_(True)
        with self._in_place_of(values):
            found = torch.autograd.grad(loss(self._student.logits(x, self._source)), self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def augment(self, x: Tensor) -> Tensor:
        return flip_and_move(x, self.generator)

    def _picked(self, which: Any) -> tuple[Tensor, Tensor]:
        images = self._images[which]
        if not len(images):
            return torch.zeros(0), self._targets[:0]
        return torch.from_numpy(self._preprocess.apply(images)), self._targets[which]

    def _without_gradient(self, x: Tensor, values: Sequence[Tensor], moments: Sequence[Moments]) -> Answers:
        with torch.no_grad(), self._in_place_of(values):
            parts = [self._run(part, moments) for part in torch.split(x, self._batch)]
        features = [p.known_features for p in parts] if self._wants_features else []
        return Answers(torch.cat([p.logits for p in parts]), torch.cat(features) if features else None)

    def _run(self, x: Tensor, moments: Sequence[Moments]) -> Answers:
        if not self._wants_features:
            return Answers(self._student.logits(x, moments))
        with _LastLinear() as seen:
            logits = self._student.logits(x, moments)
        if seen.features is None:
            raise ModelError("The student has no linear layer whose input could serve as features: choose another strategy.")
        return Answers(logits, seen.features)

    @contextmanager
    def _in_place_of(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Other values for a while. The tensors are exchanged, not written: a graph that waits for its backward pass stays
        whole."""
        kept = [p.data for p in self.parameters]
        for p, v in zip(self.parameters, values, strict=True):
            p.data = v.detach()
        try:
            yield
        finally:
            for p, k in zip(self.parameters, kept, strict=True):
                p.data = k
