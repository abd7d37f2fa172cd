"""The seam to `cloud.distil`: what a worker asks of a distiller and its teachers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cloud.settings import TeacherSpec
from cloud.training.answers import asked, grey_image
from refold.bundle import Bundle
from refold.errors import UsageError
from refold.norms import ActivationScale, NormState
from refold.v1 import samples_pb2 as pb

__all__ = ["Candidate", "Distiller", "Lesson", "MakeLesson", "Teachers", "find_maker", "make_lesson"]


class Candidate(Protocol):
    """What a training brings forth; judged by the gate before anybody runs it."""

    @property
    def states(self) -> Mapping[str, NormState]: ...
    @property
    def activations(self) -> Sequence[ActivationScale]: ...
    @property
    def domain(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def statistics_frames(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


class Distiller(Protocol):
    """Holds its own buffers; a restarted worker fills them again from the store."""

    def add_samples(self, images: NDArray[np.uint8], domain: str, unbiased: NDArray[np.bool_]) -> None:
        """uint8 (N, height, width, 3); `unbiased` bool (N,)."""

    def add_statistics(self, report: pb.StatisticsReport) -> None: ...

    def ready(self) -> Sequence[str]:
        """Domains with enough evidence for a training.

        A distiller may also have `progress() -> {domain: (samples, samples its next training wants)}`, which status tells.
        """

    def train(self, domain: str, start: Mapping[str, NormState]) -> Candidate:
        """`start`: states of the domain's own good release, which the training goes on from; empty when there is none."""


class Teachers(Protocol):
    def probabilities(self, images: NDArray[np.uint8], domain: str) -> NDArray[np.float32]:
        """float32 (N, classes)."""


@dataclass(frozen=True)
class Lesson:
    """A distiller and the teachers the gate asks; without teachers nothing shows that a candidate helps: none is released."""

    distiller: Distiller
    teachers: Teachers | None = field(default=None)


MakeLesson = Callable[..., Lesson]


def find_maker(name: str) -> MakeLesson:
    """The callable `package.module:name`. Raises UsageError when there is none."""
    module, colon, attribute = name.partition(":")
    try:
        maker = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise UsageError(f"workers.distiller: {name!r} cannot be loaded: {e}.", code="no-distiller") from e
    if not colon or not callable(maker):
        raise UsageError(f"workers.distiller is {name!r}; it is written package.module:callable.", code="no-distiller")
    return maker  # type: ignore[no-any-return]


def make_lesson(bundle: Bundle, teachers: Sequence[tuple[str, str]], settings: Mapping[str, Any], *, threads: int) -> Lesson:
    """The product's own distiller. Loads torch: workers and `refold cloud add-bundle` call it.

    Raises:
        UsageError: no teacher, one that cannot be found, or an unknown setting in [distil].
        InputError, ModelError: a teacher cannot be used, or does not answer over the bundle's classes.
    """
    from cloud.distil import Distiller as RefoldDistiller
    from cloud.distil import DistilSettings, load_teachers
    from cloud.distil import Teachers as RefoldTeachers

    numbers = DistilSettings.of({"threads": threads, **settings})
    sources = [TeacherSpec(spec=spec, weights=weights) for spec, weights in teachers]
    taught_by = load_teachers(sources, bundle.preprocess, numbers)
    for teacher in taught_by.teachers:
        alone = RefoldTeachers([teacher], bundle.preprocess, numbers)
        asked(alone, grey_image(bundle), "", int(bundle.manifest.class_count), teacher.name)
    return Lesson(RefoldDistiller(bundle, taught_by, numbers), taught_by)
