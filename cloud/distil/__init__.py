"""Distillation in the cloud: teachers that adapt themselves, a student made of the device's integers, candidate norm states.

Names are loaded when they are asked for: the service checks `DistilSettings` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloud.distil.distiller import Candidate, Distiller
    from cloud.distil.settings import DistilSettings
    from cloud.distil.student import Student
    from cloud.distil.teachers import Teacher, Teachers, TeacherSource, load_teachers

__all__ = ["Candidate", "DistilSettings", "Distiller", "Student", "Teacher", "TeacherSource", "Teachers", "load_teachers"]

WHERE = {
    "Candidate": "distiller",
    "Distiller": "distiller",
    "DistilSettings": "settings",
    "Student": "student",
    "Teacher": "teachers",
    "Teachers": "teachers",
    "TeacherSource": "teachers",
    "load_teachers": "teachers",
}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{WHERE[name]}"), name)
