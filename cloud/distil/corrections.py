"""The teachers' predictions as a training learns them: their mean, or what the settings' modifiers make of their votes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloud.distil.recipe import Calibration
from cloud.distil.settings import DistilSettings
from cloud.distil.teachers import Teachers
from cloud.training.step import TargetModifier
from cloud.training.strategies.registry import make_modifiers

__all__ = ["CorrectedTeachers"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
MADE = "\0calibration"  # a domain that no device can name


class CorrectedTeachers:
    """One per distiller: a modifier that learns from calibration images learns once.

    Attributes:
        images, labels: the calibration slice (`cloud.training.step.TeacherPool`).
    """

    def __init__(self, teachers: Teachers, calibration: Calibration, settings: DistilSettings) -> None:
        self._teachers = teachers
        self.images, self.labels = calibration.images, calibration.labels
        made = make_modifiers(settings.recipe, settings.modifiers, settings.options, ("targets",))
        self._modifiers = [m for m in made if isinstance(m, TargetModifier)]

    def probabilities(self, images: U8, domain: str) -> F32:
        """float32 (N, classes) for uint8 (N, H, W, 3); the plain mean of all votes where no modifier corrects it."""
        if not self._modifiers:
            return self._teachers.probabilities(images, domain)
        votes = self._teachers.votes(images, domain)
        combined: F32 = votes.mean(0)
        for modifier in self._modifiers:
            combined = modifier.combined(votes, combined, self)
        return combined

    def votes(self, images: U8) -> F32:
        """Each teacher's probabilities, (teachers, N, classes), adapted to these images as one domain."""
        self._teachers.adapt(MADE, images)
        found = self._teachers.votes(images, MADE)
        self._teachers.forget(MADE)
        return found
