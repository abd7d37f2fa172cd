"""Several writers at the same moment, on every database: what SQLite's single writer gives, PostgreSQL must be asked for."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from cloud.store import BundleRecord, Decision, SampleRecord, StatisticsRecord, Store
from cloud.store import tables as t
from cloud.store.store import _insert_all
from refold.errors import AccessError, RefoldError, ReleaseError

BUNDLE, COHORT, CROWD = "b" * 64, "roof", 8


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


def now() -> int:
    return int(time.time() * 1000)


def sample(n: int, cohort: str = COHORT) -> SampleRecord:
    return SampleRecord(f"{n:064x}", BUNDLE, cohort, "device", "d1", b"header", 10, False, now())


def at_once(work: Callable[[int], object], count: int = CROWD) -> tuple[list[object], list[RefoldError]]:
    """Runs `work(n)` on as many threads, all let go together; what they returned, and Refold's errors. Any other fails."""
    barrier, lock = threading.Barrier(count), threading.Lock()
    results: list[object] = []
    errors: list[RefoldError] = []
    others: list[BaseException] = []

    def run(n: int) -> None:
        barrier.wait()
        try:
            result = work(n)
            with lock:
                results.append(result)
        except RefoldError as e:
            with lock:
                errors.append(e)
        except BaseException as e:
            with lock:
                others.append(e)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not others
    return results, errors


@pytest.mark.parametrize("uses", [1, 3])
def test_a_token_is_redeemed_as_often_as_it_says_and_no_more(store: Store, uses: int) -> None:
    store.add_token("word", "roof", uses, now() + 60_000)
    won, lost = at_once(lambda n: store.redeem("word", f"device-{n}"))
    assert won == ["roof"] * uses and [e.code for e in lost] == ["bad-token"] * (CROWD - uses)


def test_one_device_that_repeats_itself_spends_a_token_once(store: Store) -> None:
    store.add_token("word", "roof", 2, now() + 60_000)
    won, lost = at_once(lambda n: store.redeem("word", "device"))
    assert len(won) == CROWD and not lost
    assert store.redeem("word", "another") == "roof"  # one use was left
    with pytest.raises(AccessError):
        store.redeem("word", "third")


def test_a_spent_token_leaves_no_trace_of_who_was_refused(store: Store) -> None:
    store.add_token("word", "roof", 1, now() + 60_000)
    store.redeem("word", "device")
    for _ in range(2):  # refused, and not let in at the second try as one who joined
        with pytest.raises(AccessError):
            store.redeem("word", "another")


def test_one_device_enrols_many_times(store: Store) -> None:
    won, lost = at_once(lambda n: store.put_device("device", "roof", f"{n:02}", 5, "a" * 64))
    assert len(won) == CROWD and not lost and len(store.devices()) == 1


def test_two_keys_under_one_id(store: Store) -> None:
    won, lost = at_once(lambda n: store.put_device("device", "roof", f"{n:02}", 5, f"{n:064x}"))
    assert len(won) == 1 and {e.code for e in lost} == {"id-taken"}


def test_the_same_samples_in_every_order(store: Store) -> None:
    def send(n: int) -> int:
        batch = [sample((i * 7 + n * 5) % 24, f"cohort-{i % 2}") for i in range(24)]
        return len(store.add_samples(batch[::-1] if n % 2 else batch))

    won, lost = at_once(send)
    stored = sum(len(store.samples_after(BUNDLE, f"cohort-{i}", 0, 99)) for i in range(2))
    assert not lost and sum(int(str(n)) for n in won) == stored


def test_the_same_report_and_the_same_bundle(store: Store) -> None:
    report = StatisticsRecord("a" * 64, BUNDLE, COHORT, "device", "d1", 0, 64, b"payload", now())
    won, lost = at_once(lambda n: store.add_statistics(report))
    assert Counter(won) == {True: 1, False: CROWD - 1} and not lost
    record = BundleRecord(BUNDLE, "net", "c" * 64, "d" * 64, 32, 32, (), 5)
    assert not at_once(lambda n: store.put_bundle(record))[1] and store.bundles() == [record]
    assert not at_once(lambda n: store.touch_cohort(BUNDLE, f"new-{n % 2}"))[1]
    assert [c.cohort for c in store.cohorts()] == ["new-0", "new-1", COHORT]


def test_a_version_is_given_to_one(store: Store) -> None:
    def release(n: int) -> int:
        store.record(Decision(BUNDLE, COHORT, "d1", "released", "why", now(), version=1, signed=b"signed"))
        return n

    won, lost = at_once(release)
    assert len(won) == 1 and {type(e) for e in lost} == {ReleaseError} and {e.code for e in lost} == {"version"}
    assert store.current_version(BUNDLE, COHORT) == 1 and len(store.releases()) == 1


def test_releases_and_rollbacks_cross(store: Store) -> None:
    for version in range(1, 4):
        store.record(Decision(BUNDLE, COHORT, "d1", "released", "why", now(), version=version, signed=b"signed"))

    def work(n: int) -> None:
        if n % 2:
            store.roll_back(BUNDLE, COHORT, n % 3, "test")
        else:
            version = store.next_version(BUNDLE, COHORT)
            store.record(Decision(BUNDLE, COHORT, "d1", "released", "why", now(), version=version, signed=b"signed"))

    _, lost = at_once(work)
    assert {type(e) for e in lost} <= {ReleaseError}
    good = store.good_versions(BUNDLE, COHORT)
    current = store.current_version(BUNDLE, COHORT)
    assert max(good, default=0) == current  # nothing good is newer than the pointer, and the pointer is at something good
    assert [r.version for r in store.releases()] == list(range(1, store.next_version(BUNDLE, COHORT)))


def test_forgetting_crosses_with_storing(store: Store) -> None:
    def work(n: int) -> None:
        for i in range(4):
            if n % 2:
                store.forget(before_ms=0, samples_per_cohort=5, statistics_per_cohort=5)
            else:
                store.add_samples([sample(n * 100 + i)])

    _, lost = at_once(work)
    assert not lost
    store.forget(before_ms=0, samples_per_cohort=5, statistics_per_cohort=5)
    assert len(store.samples_after(BUNDLE, COHORT, 0, 99)) == 5


def test_rows_become_visible_in_the_order_of_their_numbers(store: Store) -> None:
    """A worker reads on from the last number it saw: a smaller one that came to light later would never be trained on."""
    later = threading.Thread(target=store.add_samples, args=([sample(2)],))
    with store._writes() as c:
        _insert_all(c, t.samples, [sample(1)])
        later.start()
        later.join(0.3)  # it cannot get on before this transaction ends
        assert store.samples_after(BUNDLE, COHORT, 0, 9) == []
    later.join()
    assert [int(r.digest, 16) for r in store.samples_after(BUNDLE, COHORT, 0, 9)] == [1, 2]
