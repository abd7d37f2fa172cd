"""The outbox: nothing acknowledged is lost to a kill, a full disk or a repeated call; damage is set aside and said."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from samples_of import report, sample

from edge.outbox import REPORTS, Outbox
from refold.errors import InputError, StorageError

WRITER = Path(__file__).with_name("outbox_writer.py")


@pytest.fixture
def box(tmp_path):
    outbox = Outbox(tmp_path / "outbox.sqlite")
    yield outbox
    outbox.close()


def digests(outbox):
    return [h.digest for h in outbox.headers(10**6)]


def test_the_best_goes_first_and_the_newest_among_equals(box):
    made = [sample(i, score) for i, score in enumerate([0.2, 0.9, 0.5, 0.9])]
    assert box.put_many(made) == 4
    assert digests(box) == [made[i][0].digest for i in (3, 1, 2, 0)]
    assert [(s.header, s.payload) for s in box.next(2)] == [made[3], made[1]]


def test_putting_twice_changes_nothing(box):
    header, payload = sample(1)
    assert box.put(header, payload) and box.put(header, payload)
    assert len(box) == 1 and box.bytes == len(payload) + header.ByteSize()


def test_what_is_forgotten_is_gone_and_may_be_forgotten_again(box):
    header, payload = sample(1)
    box.put(header, payload)
    assert box.forget([header.digest, "unknown"]) == 1
    assert box.forget([header.digest]) == 0 and len(box) == box.bytes == 0


def test_what_could_not_be_sent_steps_back(box):
    first, second = sample(1, 0.8), sample(2, 0.5)
    box.put_many([first, second])
    box.demote([first[0].digest, "unknown"])
    assert digests(box) == [second[0].digest, first[0].digest] and box.headers(2)[1].score == pytest.approx(0.8)


def test_a_full_outbox_gives_up_the_lowest_score_then_the_oldest(tmp_path):
    one = sum(len(x) for x in (sample(0)[1],)) + sample(0, 0.5)[0].ByteSize()
    box = Outbox(tmp_path / "o.sqlite", limit_bytes=3 * one + 20)
    made = [sample(i, score) for i, score in enumerate([0.5, 0.3, 0.3])]
    box.put_many(made)
    assert box.put(*sample(3, 0.6)) and digests(box) == [sample(3)[0].digest, made[0][0].digest, made[2][0].digest]
    assert not box.put(*sample(4, 0.1)) and len(box) == 3 and box.evicted == 2
    box.close()


def test_a_sample_larger_than_the_outbox_displaces_nothing_for_good(tmp_path):
    box = Outbox(tmp_path / "o.sqlite", limit_bytes=1000)
    box.put(*sample(0, 0.9))
    assert not box.put(*sample(1, 0.1, size=5000))
    assert len(box) == 1
    box.close()


def test_headers_stop_at_a_byte_limit(box):
    box.put_many([sample(i) for i in range(10)])
    assert len(box.headers(10, limit_bytes=3 * (300 + sample(0)[0].ByteSize()) + 100)) == 3
    assert box.headers(10, limit_bytes=0) == []


def test_a_payload_that_is_not_its_digest_is_refused(box):
    with pytest.raises(InputError, match="digest"):
        box.put(sample(1)[0], b"other")
    with pytest.raises(InputError, match="limit"):
        box.put(*sample(1, size=3 * 2**20))


def test_a_score_that_is_no_number_ranks_last(box):
    box.put_many([sample(0, float("nan")), sample(1, 0.1)])
    assert digests(box)[-1] == sample(0)[0].digest


def test_a_newer_report_replaces_the_older_of_its_domain(box):
    first, second, other = report(1), report(2), report(3, domain="d1")
    for r in (first, other, second):
        box.put_report(r)
    assert box.reports(9) == [second, other]
    box.forget_report(first.digest)
    assert len(box.reports(9)) == 2
    box.forget_report(second.digest)
    assert box.reports(9) == [other]


def test_reports_of_engines_long_gone_are_dropped(box):
    for version in range(REPORTS + 5):
        box.put_report(report(version, version=version))
    assert len(box.reports(1000)) == REPORTS and box.reports(1)[0].release_version == REPORTS + 4


def test_a_put_is_announced(box):
    heard = []
    box.subscribe(lambda: heard.append(1))
    box.put(*sample(1))
    box.put_report(report(1))
    assert len(heard) == 2


def test_threads_share_it(box):
    def work(k):
        for i in range(20):
            box.put(*sample(100 * k + i))
            box.forget([sample(100 * k + i)[0].digest] if i % 2 else [])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(box) == 40 == len(set(digests(box)))


@pytest.mark.parametrize("acknowledged", [1, 7, 40])
def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path, acknowledged):
    path = tmp_path / "outbox.sqlite"
    process = subprocess.Popen([sys.executable, str(WRITER), str(path), "forever"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(acknowledged)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split("\n")[:-1] if line]
    process.stdout.close()
    process.wait()
    box = Outbox(path)
    assert box.database.set_aside is None
    kept = {h.frame: h for h in box.headers(10**6)}
    assert set(said) <= set(kept) and len(kept) <= len(said) + 1
    assert all(s.payload == sample(s.header.frame)[1] for s in box.next(10**6))
    assert box.bytes == sum(h.ByteSize() + h.size for h in kept.values())
    box.close()


def test_a_log_cut_anywhere_by_a_power_failure_leaves_what_came_before(tmp_path):
    """SQLite's log ends where the disk stopped writing; every such end is a state that once was."""
    box = Outbox(tmp_path / "o.sqlite")
    for i in range(8):
        box.put(*sample(i, size=3000))
    database, journal = (Path(f"{box.database.path}{suffix}").read_bytes() for suffix in ("", "-wal"))
    box.close()
    rng, seen = random.Random(0), set()
    for end in [0, len(journal), *(rng.randrange(len(journal)) for _ in range(40))]:
        path = tmp_path / f"cut-{end}" / "o.sqlite"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(database)
        Path(f"{path}-wal").write_bytes(journal[:end])
        cut = Outbox(path)
        assert sorted(s.header.frame for s in cut.next(99)) == list(range(len(cut))) and cut.database.set_aside is None
        assert cut.put(*sample(99))
        seen.add(len(cut) - 1)
        cut.close()
    assert {0, 8} < seen


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    """The writer's files may not grow beyond a real limit of the kernel's (RLIMIT_FSIZE); then they may again."""
    done = subprocess.run(
        [sys.executable, str(WRITER), str(tmp_path / "outbox.sqlite"), "full"], capture_output=True, text=True, check=True
    )
    (code, put, count), (after,) = ([int(x) for x in line.split()] for line in done.stdout.splitlines())
    assert code == StorageError.exit_code and 20 < put < 10_000
    assert count == put and after == put + 1
    box = Outbox(tmp_path / "outbox.sqlite")
    assert {h.frame for h in box.headers(10**6)} == set(range(put + 1))
    box.close()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("d") / "outbox.sqlite"
    box = Outbox(path)
    box.put_many([sample(i, size=4000) for i in range(20)])
    box.close()
    rng, raw = random.Random(seed), bytearray(path.read_bytes())
    if rng.random() < 0.5:
        raw = raw[: rng.randrange(1, len(raw))]
    else:
        at = rng.randrange(len(raw))
        raw[at : at + 4096] = rng.randbytes(min(4096, len(raw) - at))
    path.write_bytes(raw)
    box = Outbox(path)
    try:
        if box.database.set_aside:
            assert box.database.set_aside.is_file() and len(box) == 0
        found = box.next(100)
        assert box.put(*sample(99))
        assert len(box.next(100)) == len(found) + 1
    except StorageError as e:
        assert e.code == "damaged" and len(box) == 0
    box.close()


def test_damage_found_while_running_is_set_aside_too(box):
    box.put_many([sample(i, size=4000) for i in range(50)])
    box.database.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    raw = bytearray(box.database.path.read_bytes())
    raw[4096:] = b"\xa5" * (len(raw) - 4096)
    box.database.path.write_bytes(raw)
    other = sqlite3.connect(box.database.path)  # changes the file's counter, so that the cached pages are read anew
    other.close()
    with pytest.raises(StorageError) as e:
        for _ in range(3):
            box.database.rows("PRAGMA shrink_memory")
            box.next(100)
    assert e.value.code == "damaged" and box.database.set_aside is not None
    assert box.put(*sample(1)) and len(box) == 1


def test_a_file_of_a_newer_version_is_left_alone(tmp_path):
    path = tmp_path / "outbox.sqlite"
    Outbox(path).close()
    with sqlite3.connect(path) as c:
        c.execute("PRAGMA user_version = 9")
    c.close()
    with pytest.raises(StorageError, match="newer"):
        Outbox(path)
    assert path.is_file()


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be made"):
        Outbox(tmp_path / "file" / "outbox.sqlite")
    with pytest.raises(StorageError, match="cannot be used"):
        Outbox(tmp_path)


class OutboxMachine(RuleBasedStateMachine):
    """Against a dictionary: any order of puts, forgets and restarts."""

    @initialize()
    def begin(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "o.sqlite"
        self.box = Outbox(self.path, limit_bytes=2500)
        self.model = {}
        self.order = 0

    @rule(number=st.integers(0, 30), score=st.sampled_from([0.0, 0.25, 0.5, 0.75]), size=st.integers(1, 900))
    def put(self, number, score, size):
        header, payload = sample(1000 * number + size, score, size)
        kept = self.box.put(header, payload)
        if header.digest not in self.model:
            self.order += 1
            self.model[header.digest] = (header.score, self.order, header.ByteSize() + len(payload))
        while sum(v[2] for v in self.model.values()) > 2500:
            del self.model[min(self.model, key=lambda d: self.model[d][:2])]
        assert kept == (header.digest in self.model)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def forget(self, data):
        digest = data.draw(st.sampled_from(sorted(self.model)))
        self.box.forget([digest])
        del self.model[digest]

    @rule()
    def restart(self):
        self.box.close()
        self.box = Outbox(self.path, limit_bytes=2500)

    @invariant()
    def agrees(self):
        if hasattr(self, "box"):
            assert digests(self.box) == sorted(self.model, key=lambda d: self.model[d][:2], reverse=True)
            assert self.box.bytes == sum(v[2] for v in self.model.values()) <= 2500

    def teardown(self):
        if hasattr(self, "box"):
            self.box.close()
            self.folder.cleanup()


OutboxMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestOutboxMachine = OutboxMachine.TestCase
