"""Workers in real processes, the gate with the real engine: evidence goes up, a release comes down."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_of import COHORT, Fleet, sample, send_population, workers_of
from small_nets import images

from cloud.bundles import register
from cloud.ingest import held_back
from cloud.telemetry import render
from refold.bundle import Bundle
from refold.release import admit, open_signed
from refold.signing import KeyRing
from refold.v1 import admin_pb2

ENVIRONMENT = {
    "REFOLD_CLOUD_WORKERS__DISTILLER": "school_of_tests:make",
    "REFOLD_CLOUD_WORKERS__LOOK_S": "0.2",
    "REFOLD_CLOUD_WORKERS__INTERVAL_S": "0",
    "REFOLD_CLOUD_WORKERS__RESTART_S": "0.2",
    "REFOLD_CLOUD_WORKERS__RESTARTS": "2",
    "REFOLD_CLOUD_GATE__HELD_BACK": "8",
    "REFOLD_CLOUD_GATE__SHIFTED_CLEAN_POINTS": "100",
}


@pytest.fixture
def working(tmp_path: Path, small: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A service with worker processes that load the tests' distiller."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    with Fleet(tmp_path / "fleet", ENVIRONMENT) as running:
        register(running.store, running.cloud._objects, small.path, [("none", "")])
        yield running


def decisions(fleet: Fleet, count: int) -> list[admin_pb2.ReleaseRow]:
    operator, end = fleet.operator(), time.monotonic() + 60
    while True:
        rows = list(operator.admin.ListReleases(admin_pb2.ListReleasesRequest(), timeout=20).releases)
        if len(rows) >= count:
            return rows
        assert time.monotonic() < end, operator.admin.Status(admin_pb2.StatusRequest(), timeout=20)
        time.sleep(0.1)


def test_evidence_becomes_a_release_that_a_waiting_device_gets(working: Fleet, small: Bundle) -> None:
    device = working.device()
    send_population(device, small)
    answer = device.poll(small, wait_ms=25_000)
    if not answer.HasField("release"):  # a busy machine: one poll's wait was not enough
        answer = device.poll(small, wait_ms=25_000)
    release = open_signed(answer.release, KeyRing(device.answer.release_keys))
    admit(release, small.norms, bundle_digest=small.digest, cohort=COHORT, now_unix_ms=0)
    assert (release.version, release.domain, release.statistics_frames) == (1, "d1", 64)
    assert release.metrics["agreement"] >= release.metrics["agreement_before"]
    assert release.metrics["cross_entropy"] < release.metrics["cross_entropy_before"]
    assert release.metrics["loss"] == 0.5
    (row,) = decisions(working, 1)
    assert row.state == "current" and "agreement" in row.reason


def test_workers_as_threads_do_the_same(tmp_path: Path, small: Bundle) -> None:
    environment = {**ENVIRONMENT, "REFOLD_CLOUD_WORKERS__MODE": "thread"}
    with Fleet(tmp_path / "fleet", environment) as fleet:
        register(fleet.store, fleet.cloud._objects, small.path, [("none", "")])
        send_population(fleet.device(), small)
        assert decisions(fleet, 1)[0].state == "current"
        assert not workers_of(os.getpid())


def test_status_and_metrics_say_what_is_missing(working: Fleet, small: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "cloud.workers")
    device, operator = working.device(), working.operator()
    rows = [sample(small, image) for image in images(12, 16, 9)]
    device.upload(*rows)
    held = sum(held_back(r.header.digest, 0.25) for r in rows)
    wanted = (12 - held, 24, held, 8)
    end = time.monotonic() + 60
    while True:
        (cohort,) = operator.admin.Status(admin_pb2.StatusRequest(), timeout=20).cohorts
        if cohort.evidence:
            break
        assert time.monotonic() < end, cohort
        time.sleep(0.05)
    (found,) = cohort.evidence
    assert (found.samples, found.samples_wanted, found.held_out, found.held_out_wanted) == wanted and not found.undecided
    said = f"waiting for evidence: d1: {wanted[0]} of 24 samples, {held} of 8 held out"
    assert cohort.distiller == said and said in caplog.text
    labels = f'bundle="{small.digest[:16]}",cohort="{COHORT}",domain="d1",kind='
    assert f'refold_cloud_evidence{{{labels}"samples_wanted"}} 24' in render()
    assert f'refold_cloud_evidence{{{labels}"held_out"}} {held}' in render()


def test_the_held_back_share_is_never_taught(working: Fleet, small: Bundle) -> None:
    device = working.device()
    send_population(device, small)
    (row,) = decisions(working, 1)
    rows = working.store.samples_after(small.digest, COHORT, 0, 1000)
    kept = [r for r in rows if r.held_back]
    assert row.evidence.samples == len(rows) - len(kept)
    assert row.evidence.metrics["held_back"] == len(kept) > 0
    assert all(r.held_back == held_back(r.digest, 0.25) for r in rows)


def test_a_killed_worker_starts_again_and_releases_nothing_twice(working: Fleet, small: Bundle) -> None:
    device = working.device()
    send_population(device, small)
    decisions(working, 1)
    (worker,) = workers_of(os.getpid())
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    end = time.monotonic() + 60
    while not (status := working.cloud._supervisor.status(small.digest, COHORT)).startswith("waiting for evidence"):
        assert time.monotonic() < end, status
        time.sleep(0.05)
    time.sleep(1.0)  # five looks: enough for a second release, were there one
    assert len(decisions(working, 1)) == 1
    send_population(device, small, seed=11)
    rows = decisions(working, 2)
    # The buffers were rebuilt from the store: both reports count, and no sample was lost.
    assert rows[1].evidence.statistics_frames == 128 and rows[1].evidence.samples >= rows[0].evidence.samples


def test_a_worker_that_always_crashes_is_left_alone_and_the_service_goes_on(
    working: Fleet, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCHOOL", "crash")
    device = working.device()
    send_population(device, small)
    end = time.monotonic() + 60
    while not (status := working.cloud._supervisor.status(small.digest, COHORT)).startswith("stopped"):
        assert time.monotonic() < end, status
        time.sleep(0.05)
    assert "crashed too often" in status
    send_population(device, small, seed=5)


def test_a_candidate_gone_wrong_is_refused_with_the_reason(
    working: Fleet, small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCHOOL", "collapse")
    device = working.device()
    send_population(device, small)
    (row,) = decisions(working, 1)
    assert row.state == "refused" and "it agrees less with the teacher: agreement" in row.reason
    assert not device.poll(small).HasField("release")


def test_a_rollback_makes_the_worker_forget(working: Fleet, small: Bundle) -> None:
    device, operator = working.device(), working.operator()
    send_population(device, small)
    decisions(working, 1)
    (before,) = workers_of(os.getpid())
    request = admin_pb2.RollbackRequest(bundle_digest=small.digest, cohort=COHORT, to_version=0, reason="test")
    operator.admin.Rollback(request, timeout=20)
    before.wait(10)
    send_population(device, small, seed=12)
    rows = decisions(working, 2)
    assert (rows[0].version, rows[0].state) == (1, "rolled-back")
    assert rows[1].version in (0, 2) and rows[1].parent_version == 0 and rows[1].evidence.statistics_frames == 128


def test_an_unknown_distiller_stops_the_worker_with_a_sentence(tmp_path: Path, small: Bundle) -> None:
    environment = {**ENVIRONMENT, "REFOLD_CLOUD_WORKERS__DISTILLER": "no.such:thing"}
    with Fleet(tmp_path / "fleet", environment) as fleet:
        register(fleet.store, fleet.cloud._objects, small.path, [])
        fleet.device().upload(sample(small, images(1, 16)[0]))
        end = time.monotonic() + 60
        while not (status := fleet.cloud._supervisor.status(small.digest, COHORT)).startswith("stopped"):
            assert time.monotonic() < end, status
            time.sleep(0.05)
        assert "workers.distiller" in status


def test_the_service_itself_never_loads_torch() -> None:
    import subprocess
    import sys

    code = "import sys, cloud.server, cloud.cli, cloud.workers; assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
