"""The store's contract, against every database there is: SQLite always, PostgreSQL where REFOLD_TEST_POSTGRES names one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cloud.releases import next_version
from cloud.store import BundleRecord, Decision, DirectoryObjects, MemoryObjects, Objects, SampleRecord, StatisticsRecord, Store
from cloud.store.tables import METADATA
from refold.errors import AccessError, ReleaseError, StorageError, UsageError

BUNDLE, COHORT = "b" * 64, "roof"


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


def sample(n: int, *, cohort: str = COHORT, held_back: bool = False, domain: str = "d1", received_ms: int = 0) -> SampleRecord:
    return SampleRecord(f"{n:064x}", BUNDLE, cohort, "device", domain, b"header", 10, held_back, received_ms or now())


def report(n: int) -> StatisticsRecord:
    return StatisticsRecord(f"{n:064x}", BUNDLE, COHORT, "device", "d1", 0, 64, b"payload", now())


def decision(version: int, domain: str = "d1", **values: object) -> Decision:
    state = "released" if version else "refused"
    return Decision(BUNDLE, COHORT, domain, state, "why", now(), version=version, signed=b"signed", **values)  # type: ignore[arg-type]


def now() -> int:
    return int(time.time() * 1000)


def test_samples_are_stored_once_per_bundle_and_cohort(store: Store) -> None:
    one = sample(1)
    assert store.add_samples([one, one]) == [one] and not store.add_samples([one])
    assert store.add_samples([sample(1, cohort="cellar")])
    assert store.known_samples(BUNDLE, COHORT, [f"{n:064x}" for n in range(1200)]) == {f"{1:064x}"}
    assert store.device_samples("device") == 2


def test_samples_come_in_the_order_of_storing(store: Store) -> None:
    for n in (5, 3, 9, 1):
        store.add_samples([sample(n)])
    rows = store.samples_after(BUNDLE, COHORT, 0, 3)
    assert [int(r.digest, 16) for r in rows] == [5, 3, 9]
    assert [int(r.digest, 16) for r in store.samples_after(BUNDLE, COHORT, rows[-1].id, 3)] == [1]


def test_row_numbers_are_never_used_again(store: Store) -> None:
    for n in (1, 2):
        store.add_samples([sample(n, received_ms=1)])
    last = store.samples_after(BUNDLE, COHORT, 0, 9)[-1].id
    store.forget(before_ms=now(), samples_per_cohort=100, statistics_per_cohort=100)
    store.add_samples([sample(3)])
    assert store.samples_after(BUNDLE, COHORT, 0, 9)[0].id > last  # a worker's mark would hide the new sample otherwise


def test_held_back_samples_newest_first(store: Store) -> None:
    for n in range(6):
        store.add_samples([sample(n, held_back=n % 2 == 0, domain="d2" if n == 4 else "d1")])
    assert [int(r.digest, 16) for r in store.held_back(BUNDLE, COHORT, "d1", 10)] == [2, 0]
    assert [int(r.digest, 16) for r in store.held_back(BUNDLE, COHORT, None, 2)] == [4, 2]


def test_retention_by_age_and_by_number(store: Store) -> None:
    store.add_samples([sample(1, received_ms=1000)])
    for n in range(2, 8):
        store.add_samples([sample(n)])
        store.add_statistics(report(n))
    assert store.forget(before_ms=2000, samples_per_cohort=4, statistics_per_cohort=5) == (3, 1)
    assert [int(r.digest, 16) for r in store.samples_after(BUNDLE, COHORT, 0, 99)] == [4, 5, 6, 7]
    assert store.referenced([f"{n:064x}" for n in range(8)]) == {f"{n:064x}" for n in range(4, 8)}


def test_bundles_change_only_their_teachers(store: Store) -> None:
    record = BundleRecord(BUNDLE, "net", "c" * 64, "d" * 64, 32, 32, (("t.py:net", "w.npz"),), 5)
    store.put_bundle(record)
    assert store.bundle(BUNDLE) == record and store.bundles() == [record] and store.bundle("x") is None
    store.put_bundle(BundleRecord(BUNDLE, "net", "c" * 64, "d" * 64, 32, 32, (), 5))
    assert store.bundles()[0].teachers == ()


def test_a_token_is_spent_by_one_device(store: Store) -> None:
    store.add_token("word", "roof", 1, now() + 60_000)
    assert store.redeem("word", "a") == "roof" == store.redeem("word", "a")
    for token, device in (("word", "b"), ("other", "a")):
        with pytest.raises(AccessError) as e:
            store.redeem(token, device)
        assert e.value.code == "bad-token"


def test_a_token_is_spent_once_by_many_at_the_same_time(store: Store) -> None:
    store.add_token("word", "", 3, now() + 60_000)
    got: list[str] = []

    def join(n: int) -> None:
        try:
            store.redeem("word", f"device-{n}")
            got.append(str(n))
        except AccessError:
            pass

    threads = [threading.Thread(target=join, args=(n,)) for n in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 3


def test_devices_are_kept_seen_and_revoked(store: Store) -> None:
    store.put_device("a", "roof", "01", 5)
    store.put_device("a", "roof", "02", 6)
    store.saw_device("a", domain="d3", metrics={"fps": 2.5})
    device = store.device("a")
    assert device is not None and (device.serial, device.domain, device.metrics) == ("02", "d3", {"fps": 2.5})
    assert store.revoke("a") and not store.revoke("b")
    with pytest.raises(AccessError):
        store.put_device("a", "roof", "03", 7)
    assert [d.id for d in store.devices()] == ["a"]


def test_a_version_is_given_once(store: Store) -> None:
    store.record(decision(1))
    for wrong in (1, 3):
        with pytest.raises(ReleaseError):
            store.record(decision(wrong))
    assert (store.next_version(BUNDLE, COHORT), store.next_version(BUNDLE, "cellar")) == (2, 1)
    assert store.signed_release(BUNDLE, COHORT, 1) == b"signed"
    with pytest.raises(ReleaseError):
        store.signed_release(BUNDLE, COHORT, 2)


def test_consumed_evidence_is_remembered_per_domain(store: Store) -> None:
    store.record(decision(1, samples_upto=5, statistics_upto=2))
    store.record(decision(0, samples_upto=9, statistics_upto=4))
    store.record(decision(0, "d2", samples_upto=7))
    assert store.consumed(BUNDLE, COHORT) == {"d1": (9, 4), "d2": (7, 0)}


def test_cohort_counters(store: Store) -> None:
    assert store.cohort(BUNDLE, COHORT) is None
    store.add_samples([sample(1)])
    store.add_statistics(report(1))
    assert not store.add_statistics(report(1))
    store.record(decision(0))
    record = store.cohort(BUNDLE, COHORT)
    assert record is not None
    assert (record.samples, record.sample_bytes, record.statistics_reports, record.current_version) == (1, 10, 1, 0)
    assert record.last_gate == "why"


def test_the_migrations_make_the_tables(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store._engine.connect() as c:
        assert compare_metadata(MigrationContext.configure(c, opts={"compare_type": False}), METADATA) == []


def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'refold.db'}"
    first = Store(url)
    first.add_samples([sample(1)])
    first.close()
    again = Store(url)
    assert len(again.samples_after(BUNDLE, COHORT, 0, 9)) == 1
    again.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'refold.db'}"
    store = Store(url)
    with store._writes() as c:
        c.execute(sa.text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    store.close()
    with pytest.raises(StorageError) as e:
        Store(url)
    assert e.value.code == "newer-database"


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(StorageError) as damaged:
        Store(f"sqlite:///{tmp_path / 'text.db'}")
    assert damaged.value.code == "damaged"
    with pytest.raises(StorageError, match="cannot be opened"):
        Store(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}")
    with pytest.raises(UsageError):
        Store("no url at all")
    with pytest.raises(UsageError):
        Store("oracledb+nothing://x/y")


def test_a_locked_database_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.store.database.BUSY_MS", 100)
    url = f"sqlite:///{tmp_path / 'refold.db'}"
    one, two = Store(url), Store(url)
    with one._writes(), pytest.raises(StorageError) as e:
        two.add_samples([sample(1)])
    assert e.value.code == "database-locked"
    one.close()
    two.close()


class Fleetwide(RuleBasedStateMachine):
    """Releases and rollbacks in any order: what is current is good, what was rolled back is never handed out again."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store("sqlite://")
        self.rolled_back: set[int] = set()
        self.last = 0

    @rule(domain=st.sampled_from(["d0", "d1", ""]))
    def release(self, domain: str) -> None:
        self.last = self.store.next_version(BUNDLE, COHORT)
        self.store.record(decision(self.last, domain))

    @rule()
    def refuse(self) -> None:
        self.store.record(decision(0))

    @precondition(lambda self: self.last > 0)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        target = data.draw(st.integers(0, self.last))
        record = self.store.cohort(BUNDLE, COHORT)
        assert record is not None
        allowed = target <= record.current_version and target not in self.rolled_back
        if allowed:
            self.store.roll_back(BUNDLE, COHORT, target, "test")
            self.rolled_back |= set(range(target + 1, self.last + 1))
        else:
            with pytest.raises(ReleaseError):
                self.store.roll_back(BUNDLE, COHORT, target, "test")

    @invariant()
    def devices_arrive(self) -> None:
        record = self.store.cohort(BUNDLE, COHORT)
        current = record.current_version if record else 0
        good = self.store.good_versions(BUNDLE, COHORT)
        assert current not in self.rolled_back and current == self.store.current_version(BUNDLE, COHORT)
        for start in range(self.last + 1):
            installed, steps = start, 0
            while (following := next_version(good, installed).version) is not None:
                assert following not in self.rolled_back
                installed, steps = following, steps + 1
                assert steps <= self.last + 2
            assert installed == current

    def teardown(self) -> None:
        self.store.close()


Fleetwide.TestCase.settings = hypothesis_settings(max_examples=25, stateful_step_count=12, deadline=None)
TestFleetwide = Fleetwide.TestCase


@pytest.fixture(params=["directory", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return DirectoryObjects(tmp_path / "objects") if request.param == "directory" else MemoryObjects()


def test_objects_come_back_by_content(objects: Objects) -> None:
    digest = objects.put(b"one")
    assert objects.put(b"one") == digest and objects.get(digest) == b"one"
    assert [d for d, _ in objects.digests()] == [digest]
    objects.drop(digest)
    objects.drop(digest)
    assert list(objects.digests()) == []
    for wrong in (digest, "../../etc/passwd", ""):
        with pytest.raises(StorageError):
            objects.get(wrong)


def test_an_object_changed_on_disk_is_noticed(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path)
    digest = objects.put(b"one")
    objects.path(digest).write_bytes(b"two")
    with pytest.raises(StorageError) as e:
        objects.get(digest)
    assert e.value.code == "damaged"


def test_garbage_is_collected_and_what_is_needed_stays(tmp_path: Path) -> None:
    from cloud.retention import collect
    from cloud.settings import StorageSettings

    store, objects = Store(f"sqlite:///{tmp_path / 'refold.db'}"), DirectoryObjects(tmp_path / "objects")
    needed, orphan = objects.put(b"needed"), objects.put(b"orphan")
    store.add_samples([SampleRecord(needed, BUNDLE, COHORT, "device", "d1", b"", 6, False, now())])
    assert collect(store, objects, StorageSettings()).objects == 0  # young: its row may be on its way
    assert collect(store, objects, StorageSettings(), young_s=-1).objects == 1
    assert [d for d, _ in objects.digests()] == [needed] != [orphan]
    store.close()
