"""Collection against storing: whatever interleaves, what was acknowledged has its bytes; and the task never ends."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fleet_of import COHORT, Fleet, pictures, sample

from cloud.ingest import Ingest
from cloud.retention import collect
from cloud.settings import QuotaSettings, StorageSettings
from cloud.store import BundleRecord, DeviceRecord, DirectoryObjects, MemoryObjects, Objects, SampleRecord, Store
from cloud.upkeep import Round
from refold.bundle import Bundle
from refold.errors import StorageError

BUNDLE = "b" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'refold.db'}")
    yield opened
    opened.close()


@pytest.fixture(params=["directory", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return DirectoryObjects(tmp_path / "objects") if request.param == "directory" else MemoryObjects()


def age(objects: Objects, digest: str, seconds: float = 7200.0) -> None:
    """As if it had been put that long ago."""
    then = time.time() - seconds
    if isinstance(objects, DirectoryObjects):
        os.utime(objects.path(digest), (then, then))
    else:
        assert isinstance(objects, MemoryObjects)
        objects._payloads[digest] = objects.get(digest), then


def nobody(digests: Sequence[str]) -> set[str]:
    return set()


def test_only_what_is_old_and_needed_by_nobody_goes(objects: Objects) -> None:
    old, needed, young = (objects.put(p) for p in (b"old", b"needed", b"young"))
    age(objects, old), age(objects, needed)
    assert objects.sweep(time.time() - 3600, lambda d: {needed} & set(d)) == 1
    assert {d for d, _ in objects.digests()} == {needed, young}
    assert objects.renew(young) and not objects.renew(old)


STEPS: dict[str, Callable[[Objects, str], object]] = {
    "put": lambda objects, digest: objects.put(b"one"),
    "renew": lambda objects, digest: objects.renew(digest),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_is_wanted_again_is_young_again(objects: Objects, step: str) -> None:
    digest = objects.put(b"one")
    age(objects, digest)
    STEPS[step](objects, digest)
    assert objects.sweep(time.time() - 3600, nobody) == 0


@pytest.mark.parametrize("step", STEPS)
def test_put_between_the_listing_and_the_drop(objects: Objects, step: str) -> None:
    """The collector has listed an object as old and asked for it; then a device sends it again."""
    digest = objects.put(b"one")
    age(objects, digest)
    asked = []

    def needed(digests: Sequence[str]) -> set[str]:
        if not asked and isinstance(objects, DirectoryObjects):  # the fake has no moment between its two looks
            STEPS[step](objects, digest)
        asked.append(list(digests))
        return set()

    objects.sweep(time.time() - 3600, needed)
    if isinstance(objects, DirectoryObjects):
        assert objects.get(digest) == b"one" and asked == [[digest], []]


def test_a_row_that_comes_between_the_listing_and_the_drop(objects: Objects) -> None:
    """The row is committed after the first look and before the second: the second one, under the lock, sees it."""
    digest = objects.put(b"one")
    age(objects, digest)
    answers = iter([set(), {digest}]) if isinstance(objects, DirectoryObjects) else iter([{digest}])
    assert objects.sweep(time.time() - 3600, lambda _: next(answers)) == 0 and objects.get(digest) == b"one"


def ingest_of(store: Store, objects: Objects, bundle: Bundle) -> Callable[..., list[str]]:
    pre = bundle.preprocess
    store.put_bundle(BundleRecord(bundle.digest, "small", "c" * 64, pre.digest, pre.width, pre.height))
    store.put_device("device", COHORT, "01", 2**40)
    device = store.device("device")
    assert isinstance(device, DeviceRecord)
    ingest = Ingest(store, objects, QuotaSettings(bytes_per_hour=1e12), 0.25)
    return lambda *samples: ingest.upload(device, list(samples))[0]


def test_a_sample_that_is_sent_again_while_a_collection_runs(store: Store, tmp_path: Path, small: Bundle) -> None:
    """Its row was forgotten, its object is old and about to go; the device sends it again and is told that it is stored."""
    objects = DirectoryObjects(tmp_path / "objects")
    upload = ingest_of(store, objects, small)
    one = sample(small, pictures(1)[0])
    upload(one)
    store.forget(before_ms=2**60, samples_per_cohort=100, statistics_per_cohort=100)
    age(objects, one.header.digest)
    referenced, answers = store.referenced, []

    def at_that_moment(digests: Sequence[str]) -> set[str]:
        found = referenced(digests)
        if not answers:
            answers.extend(upload(one))
        return found

    store.referenced = at_that_moment  # type: ignore[method-assign]
    collect(store, objects, StorageSettings())
    assert answers == [one.header.digest] and objects.get(one.header.digest) == one.payload


def test_a_collection_between_a_payload_and_its_row(store: Store, tmp_path: Path, small: Bundle) -> None:
    """The call is held up for longer than any grace after it wrote the payload: it notices, and writes it again."""
    objects = DirectoryObjects(tmp_path / "objects")
    upload = ingest_of(store, objects, small)
    one = sample(small, pictures(1)[0])
    liar = sample(small, pictures(2)[1], digest=one.header.digest)  # the same name over other bytes: refused
    add = store.add_samples

    def slow(samples: Sequence[SampleRecord]) -> list[SampleRecord]:
        assert collect(store, objects, StorageSettings(), young_s=-1).objects == 1
        return add(samples)

    store.add_samples = slow  # type: ignore[method-assign]
    assert upload(one, liar) == [one.header.digest]
    assert objects.get(one.header.digest) == one.payload


def test_an_old_object_that_is_sent_again_is_never_lost(store: Store, tmp_path: Path, small: Bundle) -> None:
    """Uploads, retention that forgets every row at once, and collections without any grace, all at the same time."""
    objects = DirectoryObjects(tmp_path / "objects")
    upload = ingest_of(store, objects, small)
    samples = [sample(small, p) for p in pictures(6)]
    done, errors, sent = threading.Event(), [], [0]

    def guarded(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                while not done.is_set():
                    work()
            except BaseException as e:
                errors.append(e)
                done.set()

        return run

    held = threading.Lock()  # a row is looked up while no retention may forget it

    def send() -> None:
        for one in samples:
            with held:
                assert upload(one) == [one.header.digest]
                assert objects.get(one.header.digest) == one.payload  # acknowledged: it is there
            sent[0] += 1

    def forget() -> None:
        with held:
            store.forget(before_ms=2**60, samples_per_cohort=100, statistics_per_cohort=100)

    def sweep() -> None:
        objects.sweep(time.time() + 60, store.referenced)

    threads = [threading.Thread(target=guarded(work)) for work in (send, send, forget, sweep, sweep)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while sent[0] < 24 and not done.is_set() and time.monotonic() < end:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert not errors and sent[0] >= 6


def test_one_object_put_by_many_at_once(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    payload, errors = os.urandom(100_000), []

    def put() -> None:
        try:
            assert objects.get(objects.put(payload)) == payload
        except BaseException as e:
            errors.append(e)

    for _ in range(5):
        threads = [threading.Thread(target=put) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        objects.drop(hashlib.sha256(payload).hexdigest())
    assert not errors


def test_files_that_vanish_under_the_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    digests = [objects.put(bytes([n])) for n in range(20)]
    real = Path.stat

    def vanish(self: Path, **kwargs: object) -> os.stat_result:
        if self.name == digests[3]:
            self.unlink(missing_ok=True)
        return real(self, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "stat", vanish)
    assert {d for d, _ in objects.digests()} == set(digests) - {digests[3]}
    assert objects.sweep(time.time() + 60, nobody) == 19


def test_one_file_that_cannot_be_dropped_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    digests = [objects.put(bytes([n])) for n in range(20)]
    real = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.name == digests[3]:
            raise PermissionError(1, "Operation not permitted")
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match=r"cannot be deleted: Operation not permitted\. 1 such failure"):
        objects.sweep(time.time() + 60, nobody)
    assert [d for d, _ in objects.digests()] == [digests[3]]


def test_what_a_killed_process_left_half_written_is_collected(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    half = objects.path(objects.put(b"one")).with_name(".abc.123.tmp")
    half.write_bytes(b"half")
    assert objects.sweep(time.time() - 3600, nobody) == 0 and half.exists()
    os.utime(half, (1, 1))
    objects.sweep(time.time() - 3600, nobody)
    assert not half.exists() and objects.renew(hashlib.sha256(b"one").hexdigest())


def test_a_damaged_object_is_replaced_by_what_is_sent_again(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path / "objects")
    for damage in (b"", b"on", b"two", b"one and more"):
        digest = objects.put(b"one")
        objects.path(digest).write_bytes(damage)
        assert objects.get(objects.put(b"one")) == b"one"


def test_another_process_waits_for_the_lock(tmp_path: Path) -> None:
    """`refold cloud gc` beside a running service."""
    objects = DirectoryObjects(tmp_path / "objects")
    digest = objects.put(b"one")
    age(objects, digest)
    program = (
        "import sys, time; from pathlib import Path; from cloud.store import DirectoryObjects\n"
        f"print(DirectoryObjects(Path({str(objects.root)!r})).sweep(time.time() - 3600, lambda d: set()))"
    )
    other: list[subprocess.Popen[str]] = []

    def needed(digests: Sequence[str]) -> set[str]:
        if not other:
            other.append(subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True))
            return set()
        with pytest.raises(subprocess.TimeoutExpired):
            other[0].wait(1.5)
        return {digest}

    assert objects.sweep(time.time() - 3600, needed) == 0
    assert objects.renew(digest) in (True, False)
    out, _ = other[0].communicate(timeout=30)
    assert out.strip() in ("0", "1")  # it went on when this process was done


def test_a_payload_that_was_lost_is_asked_for_again(fleet: Fleet, small: Bundle) -> None:
    """By a disk, or by a version that collected too much: whoever still has it is not told to forget it."""
    device, one = fleet.device(), sample(small, pictures(1)[0])
    device.upload(one)
    assert list(device.offer(one).unwanted) == [one.header.digest]
    fleet.cloud._objects.drop(one.header.digest)
    assert list(device.offer(one).wanted) == [one.header.digest]
    assert list(device.upload(one).stored) == [one.header.digest]
    assert fleet.cloud._objects.get(one.header.digest) == one.payload and fleet.store.device_samples(device.id) == 1


class Boom:
    """Work that fails as told, one time after another, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.times = list(errors), 0

    def __call__(self, *_: object) -> None:
        self.times += 1
        if self.errors:
            raise self.errors.pop(0)


def test_regular_work_survives_everything_and_tells_of_it() -> None:
    work = Boom(FileNotFoundError("gone"), StorageError("The disk is full."), ValueError("x"))
    again = Round("Retention", work, 0.0)
    words = []
    for _ in range(4):
        again.once()
        words.append(again.warning)
    assert "FileNotFoundError" in words[0] and words[1].endswith("The disk is full.") and "ValueError" in words[2]
    assert words[0].startswith("Retention has failed since 20") and words[1][:45] == words[0][:45] and words[3] == ""

    async def run(round_: Round) -> None:
        with ThreadPoolExecutor(1) as pool:
            task = asyncio.create_task(round_.keep(pool))
            while work.times < 9:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()

    work.errors = [RuntimeError("y"), OSError(5, "Input/output error")]
    asyncio.run(run(again))
    assert not again.warning


def test_the_service_goes_on_collecting_after_an_error(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.server.collect", Boom(FileNotFoundError("gone")))
    fleet.cloud._retention.once()
    assert "Retention has failed" in fleet.cloud._retention.warning
    fleet.cloud._retention.once()
    assert not fleet.cloud._retention.warning
