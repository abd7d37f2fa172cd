"""Distillation in the cloud: teachers that adapt themselves, a student made of the device's integers, candidate norm states."""

from __future__ import annotations

from cloud.distil.distiller import Candidate, Distiller
from cloud.distil.settings import DistilSettings
from cloud.distil.student import Student
from cloud.distil.teachers import Teacher, Teachers, TeacherSource, load_teachers

__all__ = ["Candidate", "DistilSettings", "Distiller", "Student", "Teacher", "TeacherSource", "Teachers", "load_teachers"]
