"""Making a bundle known: checked, copied into the object store, listed with its teachers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from cloud.store import BundleRecord, DirectoryObjects, Store
from refold.bundle import Bundle
from refold.errors import BundleError, UsageError

__all__ = ["absolute_teachers", "checked", "open_stored", "register"]


def register(store: Store, objects: DirectoryObjects, path: Path, teachers: Sequence[tuple[str, str]]) -> BundleRecord:
    """Adds a bundle, or replaces its teachers. Relative teacher files become absolute: workers start elsewhere.

    Raises:
        BundleError: damaged, or without the parts the service needs.
        UsageError: a teacher's file does not exist.
        StorageError: the disk is full.
    """
    bundle = checked(path)
    content = path.read_bytes()
    record = BundleRecord(
        digest=bundle.digest,
        name=(bundle.manifest.name or path.stem)[:256],
        object=objects.put(content),
        preprocess_digest=bundle.preprocess.digest,
        width=bundle.preprocess.width,
        height=bundle.preprocess.height,
        teachers=absolute_teachers(teachers),
        added_ms=int(time.time() * 1000),
    )
    known = store.bundle(bundle.digest)
    if known is None or (teachers and known.teachers != record.teachers):
        store.put_bundle(record)
        known = record
    if not objects.renew(record.object):  # dropped by a collection between the two lines above
        objects.put(content)
    return known


def checked(path: Path) -> Bundle:
    """Opens a bundle that is to be adapted. Raises BundleError when it is damaged or has nothing to adapt."""
    bundle = Bundle.open(path)
    bundle.verify()
    if not bundle.manifest.student or not bundle.norms.norms:
        raise BundleError(f"{path} has no cloud student or no norms: nothing to adapt. Export it again.", code="no-student")
    return bundle


def absolute_teachers(teachers: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """(spec, weights) with whole paths. Raises UsageError when a file does not exist."""
    return tuple((_absolute(spec, "teacher"), _absolute(weights, "teacher's weights")) for spec, weights in teachers)


def _absolute(spec: str, what: str) -> str:
    file, colon, name = spec.partition(":")
    if not file or not (file.endswith((".py", ".pt2")) or "weights" in what or os.sep in file):
        return spec  # package.module:callable
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise UsageError(f"There is no {what} file {path}.", code="no-teacher")
    return f"{path}{colon}{name}"


def open_stored(objects: DirectoryObjects, record: BundleRecord) -> Bundle:
    """The bundle from the object store. Raises BundleError or StorageError when it is not there or was changed."""
    objects.get(record.object)
    return Bundle.open(objects.path(record.object))
