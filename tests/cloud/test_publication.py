"""A publication between a rollback and the renewal of its worker does not undo the rollback; and every release has its time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from fleet_of import COHORT, Fleet

import cloud.store.store as module
from cloud.overview import list_releases
from cloud.releases import DAY_MS, Outcome, Releases
from cloud.store import Decision, Store
from cloud.worker import Job
from cloud.workers import Keeper
from edge.trust import Home, Memory, examine, examine_lease
from refold.bundle import Bundle
from refold.errors import ReleaseError, SignatureError
from refold.lease import Lease, open_lease, seal_lease
from refold.release import Release, digest, encode, open_signed
from refold.signing import KeyRing, SigningKey
from refold.v1 import admin_pb2, norms_pb2

BUNDLE = "b" * 64
KEY = SigningKey.generate()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path / 'refold.db'}"
    if request.param == "postgresql":
        url = os.environ.get("REFOLD_TEST_POSTGRES", "")
        if not url:
            pytest.skip("REFOLD_TEST_POSTGRES is unset: give the URL of an empty database to test against PostgreSQL")
        engine = sa.create_engine(url)
        with engine.begin() as c:
            c.execute(sa.text("DROP SCHEMA public CASCADE"))
            c.execute(sa.text("CREATE SCHEMA public"))
        engine.dispose()
    opened = Store(url)
    yield opened
    opened.close()


def outcome(generation: int | None = None, passed: bool = True) -> Outcome:
    payload = encode(Release(BUNDLE, COHORT, 1 if passed else 0, {}, domain="d1"))
    return Outcome(payload, passed, "a test", 5, 5, generation)


def test_a_worker_that_began_before_a_rollback_publishes_nothing_after_it(store: Store) -> None:
    moved: list[tuple[str, str]] = []
    releases = Releases(store, KEY, lambda *pair: moved.append(pair))
    began = store.generation(BUNDLE, COHORT)
    assert [releases.publish(outcome(began)) for _ in range(2)] == [1, 2]
    store.roll_back(BUNDLE, COHORT, 1, "an operator")
    moved.clear()
    for passed in (True, False):  # a refusal would hide the evidence from the fresh worker
        with pytest.raises(ReleaseError) as e:
            releases.publish(outcome(began, passed))
        assert e.value.code == "stale"
    assert store.current_version(BUNDLE, COHORT) == 1 and not moved
    assert [r.state for r in store.releases()] == ["released", "rolled-back"]
    fresh = store.generation(BUNDLE, COHORT)
    assert fresh > began and releases.publish(outcome(fresh)) == 3
    store.roll_back(BUNDLE, COHORT, 0, "again")
    assert store.generation(BUNDLE, COHORT) > fresh


def test_the_keeper_drops_it_and_takes_a_fresh_worker(store: Store, tmp_path: Path) -> None:
    """The rollback is committed; the keeper has not heard of it when its worker's outcome arrives."""
    from cloud.settings import GateSettings, WorkerSettings

    releases = Releases(store, KEY)
    keeper = Keeper(Job("", tmp_path, BUNDLE, COHORT, WorkerSettings(), GateSettings(), {}), releases.publish)
    began = store.generation(BUNDLE, COHORT)
    keeper._hear(("outcome", outcome(began)))
    assert store.current_version(BUNDLE, COHORT) == 1
    store.roll_back(BUNDLE, COHORT, 0, "an operator")
    assert not keeper._recall
    keeper._hear(("outcome", outcome(began)))
    assert store.current_version(BUNDLE, COHORT) == 0 and keeper._recall


def test_a_rollback_in_the_middle_of_a_publication_waits_and_takes_it_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publication has looked at the generation and not yet moved the pointer when the rollback comes."""
    releases = Releases(store, KEY)
    releases.publish(outcome())
    inside, go, real = threading.Event(), threading.Event(), module._generation

    def paused(*arguments: object) -> int:
        found = real(*arguments)  # type: ignore[arg-type]
        inside.set()
        go.wait(10)
        return found

    monkeypatch.setattr(module, "_generation", paused)
    publishing = threading.Thread(target=releases.publish, args=(outcome(0),))
    publishing.start()
    assert inside.wait(10)
    rolling = threading.Thread(target=store.roll_back, args=(BUNDLE, COHORT, 0, "an operator"))
    rolling.start()
    rolling.join(0.2)
    assert rolling.is_alive()  # it waits for the cohort's row
    go.set()
    publishing.join(10)
    rolling.join(10)
    assert store.current_version(BUNDLE, COHORT) == 0
    assert [r.state for r in store.releases()] == ["rolled-back", "rolled-back"]


def test_decisions_of_before_generations_are_taken_as_they_were(store: Store) -> None:
    store.record(Decision(BUNDLE, COHORT, "d1", "released", "why", 1, version=1, signed=b"signed"))
    store.roll_back(BUNDLE, COHORT, 0, "x")
    store.record(Decision(BUNDLE, COHORT, "d1", "released", "why", 1, version=2, signed=b"signed"))
    assert store.current_version(BUNDLE, COHORT) == 2


# ── expiry ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_release_can_be_installed_for_as_long_as_the_cloud_renews_it(store: Store, small: Bundle) -> None:
    clock = [1_000 * DAY_MS]
    releases = Releases(store, KEY, valid_days=30, now_ms=lambda: clock[0])
    payload = encode(Release(small.digest, COHORT, 1, {}, domain="d1"))
    for _ in range(2):
        releases.publish(Outcome(payload, True, "a test", 0, 0))
    home = Home(small.digest, COHORT, small.norms, KeyRing([KEY.public]))

    def may_install(signed: norms_pb2.SignedRelease, lease: Lease | None = None, memory: Memory | None = None) -> bool:
        try:
            examine(signed, home, memory or Memory(), ordered=True, now_unix_ms=clock[0], lease=lease)
        except ReleaseError as e:
            assert e.code == "expired" and "2" in e.message
            return False
        return True

    early = releases.answer(small.digest, COHORT, 2)
    assert early is not None
    release = open_signed(early.release, home.ring)
    assert release.expires_unix_ms == clock[0] + 30 * DAY_MS and release.created_unix_ms == clock[0]
    assert may_install(early.release)
    clock[0] += 31 * DAY_MS
    assert not may_install(early.release)
    late = releases.answer(small.digest, COHORT, 2)
    assert late is not None and late.release == early.release  # the same bytes, the same digest: nothing is installed anew
    lease = examine_lease(late.lease, late.release.payload, home)
    assert lease.expires_unix_ms == clock[0] + 30 * DAY_MS and may_install(late.release, lease)
    assert may_install(late.release, None, Memory(current=digest(late.release.payload)))  # what runs does not expire
    store.roll_back(small.digest, COHORT, 1, "an operator")
    assert releases.answer(small.digest, COHORT, 2) is None  # nothing renews it any more
    clock[0] += 31 * DAY_MS
    assert not may_install(late.release, lease)


def test_a_lease_is_for_one_release_and_signed(small: Bundle) -> None:
    home = Home(small.digest, COHORT, small.norms, KeyRing([KEY.public]))
    payload = encode(Release(small.digest, COHORT, 1, {}))
    good = Lease(small.digest, COHORT, 1, digest(payload), 5, 10)
    signed = seal_lease(good, KEY)
    assert examine_lease(signed, payload, home) == good
    for wrong in (
        Lease(small.digest, COHORT, 1, "0" * 64, 5, 10),
        Lease("0" * 64, COHORT, 1, good.release_digest, 5, 10),
        Lease(small.digest, "cellar", 1, good.release_digest, 5, 10),
    ):
        with pytest.raises(ReleaseError) as e:
            examine_lease(seal_lease(wrong, KEY), payload, home)
        assert e.value.code == "lease"
    with pytest.raises(SignatureError):
        examine_lease(seal_lease(good, SigningKey.generate()), payload, home)
    with pytest.raises(SignatureError):
        changed = norms_pb2.SignedLease(payload=signed.payload + b"\x38\x7f", signatures=signed.signatures)
        examine_lease(changed, payload, home)


def test_signed_bytes_of_one_kind_are_not_taken_for_the_other(small: Bundle) -> None:
    payload = encode(Release(small.digest, COHORT, 1, {}, expires_unix_ms=10))
    ring = KeyRing([KEY.public])
    with pytest.raises(ReleaseError) as e:
        open_lease(norms_pb2.SignedLease(payload=payload, signatures=[KEY.sign(payload)]), ring)
    assert e.value.code == "lease"
    lease = seal_lease(Lease(small.digest, COHORT, 1, digest(payload), 5, 10), KEY)
    with pytest.raises(ReleaseError) as e:
        open_signed(norms_pb2.SignedRelease(payload=lease.payload, signatures=lease.signatures), ring)
    assert e.value.code == "format"


def test_releases_are_listed_with_their_time(store: Store) -> None:
    releases = Releases(store, KEY, valid_days=2)
    for _ in range(2):
        releases.publish(outcome())
    releases.publish(outcome(passed=False))
    store.roll_back(BUNDLE, COHORT, 1, "an operator")
    good, back, refused = list_releases(store, "", "", releases.valid_ms).releases
    assert 0 < back.expires_unix_ms <= good.expires_unix_ms and not refused.expires_unix_ms
    assert back.expires_unix_ms - back.created_unix_ms == 2 * DAY_MS


def test_a_poll_brings_the_lease_and_an_operator_sees_the_time(fleet: Fleet, small: Bundle) -> None:
    device = fleet.device()
    payload = encode(Release(small.digest, COHORT, 1, {}, domain="d1"))
    Releases(fleet.store, fleet.cloud._key, valid_days=0.00001).publish(Outcome(payload, True, "a test", 0, 0))
    answer = device.poll(small)
    ring = KeyRing(device.answer.release_keys)
    release, lease = open_signed(answer.release, ring), open_lease(answer.lease, ring)
    assert lease.release_digest == digest(answer.release.payload) and lease.version == 1
    assert lease.expires_unix_ms - lease.issued_unix_ms == 30 * DAY_MS > release.expires_unix_ms - release.created_unix_ms
    (row,) = fleet.operator().admin.ListReleases(admin_pb2.ListReleasesRequest(), timeout=20).releases
    assert row.expires_unix_ms > row.created_unix_ms + 29 * DAY_MS
