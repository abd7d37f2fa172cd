"""Where the service keeps things: rows in a database (`Store`), payloads by content (`Objects`)."""

from __future__ import annotations

from cloud.store.objects import DirectoryObjects, MemoryObjects, Objects
from cloud.store.records import (
    BundleRecord,
    CohortRecord,
    Decision,
    DeviceRecord,
    OperatorRecord,
    ReleaseRecord,
    SampleRecord,
    StatisticsRecord,
)
from cloud.store.store import Store

__all__ = [
    "BundleRecord",
    "CohortRecord",
    "Decision",
    "DeviceRecord",
    "DirectoryObjects",
    "MemoryObjects",
    "Objects",
    "OperatorRecord",
    "ReleaseRecord",
    "SampleRecord",
    "StatisticsRecord",
    "Store",
]
