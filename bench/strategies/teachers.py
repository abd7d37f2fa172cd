"""The data folder's teachers, asked once for each answer that all rows share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from bench.adaptation.refold_method import TEACHERS
from bench.adaptation.student_bundle import student_bundle
from cloud.distil import DistilSettings, Teachers, load_teachers
from cloud.settings import TeacherSpec
from demo.images import data_folder
from refold.errors import InputError

__all__ = ["CachedTeachers", "cached_teachers"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


class CachedTeachers(Teachers):
    """Teachers that are asked the same again and again: what they measured and answered is kept."""

    def __init__(self, teachers: Teachers) -> None:
        super().__init__(teachers.teachers, teachers.preprocess, teachers.settings)
        self._known: dict[tuple[str, str, bytes], F32] = {}
        self._adapted: dict[str, bytes] = {}
        self._waiting: dict[str, U8] = {}

    def adapt(self, domain: str, images: U8) -> None:
        """Waits until a question comes whose answer is not known."""
        key = _digest(images)
        if self._adapted.get(domain) != key:
            self._adapted[domain], self._waiting[domain] = key, images

    def forget(self, domain: str) -> None:
        super().forget(domain)
        self._adapted.pop(domain, None)
        self._waiting.pop(domain, None)

    def probabilities(self, images: U8, domain: str = "") -> F32:
        return self._once("probabilities", super().probabilities, images, domain)

    def votes(self, images: U8, domain: str = "") -> F32:
        return self._once("votes", super().votes, images, domain)

    def _once(self, what: str, ask: Callable[[U8, str], F32], images: U8, domain: str) -> F32:
        key = (what, domain, _digest(images) + self._adapted.get(domain, b""))
        if key not in self._known:
            if domain in self._waiting:
                super().adapt(domain, self._waiting.pop(domain))
            self._known[key] = ask(images, domain)
        return self._known[key]


@cache
def cached_teachers() -> CachedTeachers:
    """One for all pieces of a process. Raises InputError without REFOLD_DATA."""
    folder = data_folder()
    if folder is None:
        raise InputError("The teachers' weights are needed: set REFOLD_DATA to their folder.", code="no-data")
    sources = [TeacherSpec(spec=f"demo.models:{make}", weights=str(folder / f"{name}.npz")) for name, make in TEACHERS]
    return CachedTeachers(load_teachers(sources, student_bundle().preprocess, DistilSettings()))


def _digest(images: U8) -> bytes:
    return hashlib.sha256(images.tobytes()).digest()
