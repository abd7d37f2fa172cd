"""What strategies and modifiers are shown, and what they answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Answers", "Context", "Modifier", "NoSettings", "Settings", "Step", "Strategy", "TargetModifier", "TeacherPool"]


@dataclass(frozen=True)
class Answers:
    """Of one network for one view of n images.

    Attributes:
        logits: float32 (n, classes).
        features: float32 (n, d), the last linear layer's input; None where nobody needs it.
    """

    logits: Tensor
    features: Tensor | None = None

    @property
    def known_features(self) -> Tensor:
        assert self.features is not None, "a strategy that reads features names them in `needs`"
        return self.features


@dataclass(frozen=True)
class Step:
    """One gradient step. Tensors of the student carry gradients, all others do not.

    Attributes:
        x: images, preprocessed, float32 (n, 3, H, W).
        student: answers with the present gamma and beta and the domain's statistics.
        teachers: probabilities, float32 (n, classes), after every correction.
        exported: logits of the exported model, (n, classes); needs "exported".
        augmented: the student's answers for another view of the same images; needs "augmented".
        replay: the student's answers for calibration images behind the exported statistics, and their targets (n, classes);
            needs "replay".
        weights: of each image, (n,); the product of all modifiers' weights.
        again: True on the second pass of a sharpness-aware step.
    """

    x: Tensor
    student: Answers
    teachers: Tensor
    exported: Tensor | None = None
    augmented: Answers | None = None
    replay: tuple[Answers, Tensor] | None = None
    weights: Tensor = field(default_factory=lambda: torch.ones(1))
    again: bool = False

    def mean(self, values: Tensor) -> Tensor:
        """Mean of one value per image, (n,), weighed by `weights`."""
        return (self.weights * values).mean()

    def weighed(self, weights: Tensor) -> Step:
        return replace(self, weights=weights)


class Context(Protocol):
    """What does not change from step to step.

    Attributes:
        classes: how many.
        parameters: gamma and beta of every norm, live.
        exported: their exported values.
        generator: of everything random.
    """

    classes: int
    parameters: list[Tensor]
    exported: list[Tensor]
    generator: torch.Generator

    def calibration(self, count: int) -> tuple[Tensor, Tensor]:
        """Up to `count` calibration images, preprocessed (m, 3, H, W), and their targets (m, classes); m may be 0."""
        ...

    def answers(self, x: Tensor, values: Sequence[Tensor]) -> Answers:
        """Of the student with `values` in the place of its parameters, behind the domain's statistics; no gradient."""
        ...

    def exported_answers(self, x: Tensor) -> Answers:
        """Of the exported model; no gradient."""
        ...

    def exported_gradients(self, x: Tensor, loss: Callable[[Tensor], Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of `loss(logits)` at `values`, behind the exported statistics."""
        ...

    def augment(self, x: Tensor) -> Tensor:
        """Another view of the same images."""
        ...


@dataclass(frozen=True)
class Settings:
    """Of every strategy in the shared loop. `rate`: Adam's learning rate, constant."""

    rate: float = 1e-3


@dataclass(frozen=True)
class NoSettings:
    """Of a modifier without numbers, and of recipes whose settings are `DistilSettings`."""


S = TypeVar("S", bound=Settings)
M = TypeVar("M")


class Strategy(ABC, Generic[S]):
    """A loss, and what goes with it. One object serves one training.

    Attributes:
        source: where the method was published.
        formula: the loss in one line.
        needs: of "exported", "augmented", "replay", "features".
        moved: the student's own view is mirrored and moved as well: for losses whose targets are the teachers'.
        radius: of a sharpness-aware step, in the norm of the gradient; 0: a plain step.
    """

    source: ClassVar[str]
    formula: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    moved: ClassVar[bool] = False
    settings_type: ClassVar[type]
    radius: float = 0.0

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def begin(self, context: Context) -> None:
        """Called once, before the first step."""
        self.context = context

    def trained(self, count: int) -> range:
        """Which of `count` parameters learn, by number."""
        return range(count)

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """Scalar."""

    def after(self) -> bool:
        """Called after each step; gradients are still there. True: went back to the start, the optimiser forgets."""
        return False

    def released(self) -> list[Tensor]:
        """Values of gamma and beta that are released."""
        return [p.detach().clone() for p in self.context.parameters]


class Modifier(ABC, Generic[M]):
    """Weighs the images of a step, or adds a term to its loss. One object serves one training."""

    source: ClassVar[str]
    formula: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    settings_type: ClassVar[type] = NoSettings

    def __init__(self, settings: M) -> None:
        self.settings = settings

    def begin(self, context: Context) -> None:
        """Called once, before the first step."""
        self.context = context

    def weights(self, step: Step) -> Tensor | None:
        """Weight of each image, (n,), no gradient; None: all alike."""
        return None

    def penalty(self, step: Step) -> Tensor | None:
        """Scalar, added to the loss; None: nothing."""
        return None


class TeacherPool(Protocol):
    """The teachers, and the labelled calibration images.

    Attributes:
        images, labels: uint8 (m, H, W, 3) and int64 (m,); empty where a bundle has none.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def votes(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Each teacher's probabilities, (teachers, n, classes), adapted to these images as one domain."""
        ...


class TargetModifier(ABC, Generic[M]):
    """Corrects the teachers' predictions before anything is learnt. One object serves a distiller for its life."""

    source: ClassVar[str]
    formula: ClassVar[str]
    settings_type: ClassVar[type] = NoSettings

    def __init__(self, settings: M) -> None:
        self.settings = settings

    @abstractmethod
    def combined(self, votes: NDArray[np.float32], combined: NDArray[np.float32], pool: TeacherPool) -> NDArray[np.float32]:
        """The predictions to learn from.

        Args:
            votes: of each teacher, float32 (teachers, n, classes), rows sum to 1.
            combined: what the modifiers before this one made of them (the mean, at first), float32 (n, classes).

        Returns:
            float32 (n, classes), rows sum to 1.
        """
