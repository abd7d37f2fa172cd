"""What an operator sees: devices, cohorts and releases as messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from cloud.store import ReleaseRecord, Store
from cloud.store.store import GOOD
from cloud.training.waiting import Waiting
from refold import __version__
from refold.v1 import admin_pb2 as pb
from refold.v1 import norms_pb2

__all__ = ["list_releases", "status"]


def status(
    store: Store,
    distiller: Callable[[str, str], str],
    waiting: Callable[[str, str], Sequence[Waiting]] = lambda bundle, cohort: (),
) -> pb.StatusResponse:
    """Everything at a glance.

    Args:
        distiller: says what the worker of a (bundle digest, cohort) does; waiting: what evidence it still wants.
    """
    names = {b.digest: b.name for b in store.bundles()}
    devices = [
        pb.DeviceStatus(
            device_id=d.id,
            cohort=d.cohort,
            bundle_digest=d.bundle_digest,
            release_version=d.release_version,
            last_seen_unix_ms=d.last_seen_ms,
            domain=d.domain,
            metrics=dict(d.metrics),
            last_error="revoked" if d.revoked_ms else d.last_error,
        )
        for d in store.devices()
    ]
    cohorts = [
        pb.CohortStatus(
            bundle_digest=c.bundle_digest,
            bundle_name=names.get(c.bundle_digest, ""),
            cohort=c.cohort,
            current_version=c.current_version,
            samples=c.samples,
            sample_bytes=c.sample_bytes,
            statistics_reports=c.statistics_reports,
            distiller=distiller(c.bundle_digest, c.cohort),
            last_gate=c.last_gate,
            evidence=[pb.EvidenceStatus(**asdict(w)) for w in waiting(c.bundle_digest, c.cohort)],
        )
        for c in store.cohorts()
    ]
    return pb.StatusResponse(devices=devices, cohorts=cohorts, version=__version__)


def list_releases(store: Store, bundle_digest: str, cohort: str, valid_ms: int = 0) -> pb.ListReleasesResponse:
    """Every decision of the matching cohorts, oldest first; "" matches any. `valid_ms`: of a good one's lease at a poll."""
    rows = store.releases(bundle_digest, cohort)
    serving: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.state == GOOD:
            key = (row.bundle_digest, row.cohort, row.domain)
            serving[key] = max(serving.get(key, 0), row.version)
    return pb.ListReleasesResponse(releases=[_row(r, serving, _until(store, r, valid_ms)) for r in rows])


def _until(store: Store, r: ReleaseRecord, valid_ms: int) -> int:
    """Until when a device may install it, Unix ms; a good one's time begins anew at every poll. 0: for ever, or refused."""
    if not r.version:
        return 0
    signed = norms_pb2.SignedRelease.FromString(store.signed_release(r.bundle_digest, r.cohort, r.version))
    own = int(norms_pb2.Release.FromString(signed.payload).expires_unix_ms)
    return max(own, time.time_ns() // 1_000_000 + valid_ms) if own and r.state == GOOD else own


def _row(r: ReleaseRecord, serving: dict[tuple[str, str, str], int], until_ms: int) -> pb.ReleaseRow:
    state = r.state
    if state == GOOD:
        state = "current" if serving[r.bundle_digest, r.cohort, r.domain] == r.version else "superseded"
    return pb.ReleaseRow(
        version=r.version,
        parent_version=r.parent_version,
        created_unix_ms=r.created_ms,
        bundle_digest=r.bundle_digest,
        cohort=r.cohort,
        domain=r.domain,
        bytes=r.size,
        digest=r.digest,
        state=state,
        reason=r.reason,
        expires_unix_ms=until_ms,
        evidence=norms_pb2.ReleaseEvidence(samples=r.samples, statistics_frames=r.statistics_frames, metrics=dict(r.metrics)),
    )
