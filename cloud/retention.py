"""Forgetting: samples that are too old or too many, and files that no row needs any more."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cloud.settings import StorageSettings
from cloud.store import Objects, Store

__all__ = ["Collected", "collect"]

YOUNG_S = 3600.0  # an object is written before its row: most get one soon, and need not be written again (cloud/ingest.py)


@dataclass(frozen=True)
class Collected:
    samples: int
    statistics: int
    objects: int


def collect(store: Store, objects: Objects, settings: StorageSettings, *, young_s: float = YOUNG_S) -> Collected:
    """Applies the retention settings; returns what was dropped.

    Raises:
        StorageError: the database or the disk fails; running it again continues.
    """
    now = time.time()
    samples, statistics = store.forget(
        before_ms=int((now - settings.retention_days * 86_400) * 1000),
        samples_per_cohort=settings.samples_per_cohort,
        statistics_per_cohort=settings.statistics_per_cohort,
    )
    return Collected(samples, statistics, objects.sweep(now - young_s, store.referenced))
