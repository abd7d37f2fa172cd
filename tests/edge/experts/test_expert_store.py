"""The store: demand before read-ahead, digests, and what is said when a disk fails."""

from __future__ import annotations

import errno
import mmap
import os
import threading

import numpy as np
import pytest
from expert_files import BASE, expected, make_index, until, write_model

from edge.experts import raw
from edge.experts.faulty import FaultyFile
from edge.experts.raw import RawFile
from edge.experts.store import RecordStore
from refold.errors import BundleError, StorageError

BLOCK = 4096


class Reading:
    """A store over a double, with what is needed to wait for it."""

    def __init__(self, file, index, *, threads=1, **kwargs):
        self.file, self.index = file, index
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.finished = []
        self.store = RecordStore(file, "m.refold", BASE, self.lock, self._done, threads=threads, block=BLOCK, **kwargs)

    def _done(self, ticket):
        self.finished.append(ticket)
        self.changed.notify_all()

    def submit(self, layer, expert, demand=True):
        record = self.index[layer, expert]
        with self.lock:
            return self.store.submit(record, np.zeros(record.size, np.uint8), demand=demand)

    def wait(self, *tickets):
        with self.lock:
            assert self.changed.wait_for(lambda: all(t.done for t in tickets), 10)
        return tickets

    def read(self, layer, expert):
        ticket = self.submit(layer, expert)
        self.wait(ticket)
        if ticket.error:
            raise ticket.error
        return ticket


@pytest.fixture
def model():
    return make_index(hidden=256, intermediate=64)


@pytest.fixture
def reading(model):
    index, content = model
    made = Reading(FaultyFile(content), index)
    yield made
    made.file.gate.set()
    made.store.close()


def test_a_demand_read_overtakes_read_ahead_after_the_block_under_way(reading):
    index = reading.index
    assert index[0, 0].size > 3 * BLOCK
    reading.file.gate.clear()
    ahead = reading.submit(0, 0, demand=False)
    until(lambda: len(reading.file.reads) == 1)
    demand = reading.submit(1, 3)
    reading.file.gate.set()
    reading.wait(ahead, demand)
    order = [(o - BASE) // index[0, 0].size for o, _ in reading.file.reads]
    blocks = index[0, 0].size // BLOCK
    assert order == [0] + [11] * blocks + [0] * (blocks - 1)
    assert reading.finished == [demand, ahead]
    assert reading.store.disk.demand_bytes == index[1, 3].size and reading.store.disk.ahead_bytes == index[0, 0].size


def test_cancelled_read_ahead_begins_no_further_block(reading):
    reading.file.gate.clear()
    under_way, queued = reading.submit(0, 0, demand=False), reading.submit(0, 1, demand=False)
    until(lambda: len(reading.file.reads) == 1)
    with reading.lock:
        reading.store.cancel(under_way)
        reading.store.cancel(queued)
    assert queued.done and not under_way.done  # its memory is still being written to
    reading.file.gate.set()
    reading.wait(under_way)
    assert len(reading.file.reads) == 1 and under_way.cancelled and not under_way.ready
    reading.read(0, 0)


def test_read_ahead_that_is_asked_for_becomes_demand(reading):
    reading.file.gate.clear()
    first, second = reading.submit(0, 0, demand=False), reading.submit(0, 1, demand=False)
    until(lambda: len(reading.file.reads) == 1)
    with reading.lock:
        reading.store.promote(second)
        reading.store.cancel(second)  # too late: somebody waits
    reading.file.gate.set()
    reading.wait(first, second)
    assert reading.finished == [second, first] and second.ready


def test_a_store_is_idle_once_digests_are_checked_too(reading, monkeypatch):
    checking, go = threading.Event(), threading.Event()
    monkeypatch.setattr(RecordStore, "_matches", staticmethod(lambda ticket: checking.set() or go.wait(10)))
    ticket = reading.submit(0, 0)
    assert checking.wait(10) and not reading.store.idle
    go.set()
    reading.wait(ticket)
    assert reading.store.idle and ticket.ready


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_a_bit_that_flips_once_is_read_again(model, verify):
    index, content = model
    reading = Reading(FaultyFile(content), index, verify=verify)
    reading.file.flip, reading.file.flips_left = {BASE + index[1, 2].offset + 777}, 1
    ticket = reading.read(1, 2)
    right = ticket.memory.tobytes() == expected(content, index, 1, 2)
    assert right == (verify != "never") and reading.store.disk.again == (verify != "never")
    reading.store.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bit_that_stays_flipped_is_damage_that_names_its_expert(model, threads):
    index, content = model
    reading = Reading(FaultyFile(content), index, threads=threads)
    reading.file.flip = {BASE + index[2, 7].offset + 9000}
    with pytest.raises(BundleError, match=r"Expert 7 of layer 2 in m\.refold is damaged") as told:
        reading.read(2, 7)
    assert told.value.code == "digest"
    assert reading.read(2, 6).memory.tobytes() == expected(content, index, 2, 6)
    reading.store.close()


@pytest.mark.parametrize(("verify", "caught"), [("first", False), ("always", True)])
def test_always_also_catches_what_breaks_after_the_first_read(model, verify, caught):
    index, content = model
    reading = Reading(FaultyFile(content), index, verify=verify)
    reading.read(0, 5)
    reading.file.flip = {BASE + index[0, 5].offset + 1}
    if caught:
        with pytest.raises(BundleError):
            reading.read(0, 5)
    else:
        reading.read(0, 5)
    reading.store.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ENOMEM])
def test_a_failing_disk_is_named_with_the_expert_and_may_recover(reading, number):
    index = reading.index
    reading.file.fail, reading.file.failures_left = {BASE + index[1, 1].offset + 5000: number}, 1
    with pytest.raises(StorageError, match="Expert 1 of layer 1 in .*" + os.strerror(number)):
        reading.read(1, 1)
    assert reading.read(1, 1).memory.tobytes() == expected(reading.file.content, index, 1, 1)


def test_a_truncated_file_is_said(reading):
    index = reading.index
    reading.file.content = reading.file.content[: BASE + index[2, 7].offset + 5000]
    with pytest.raises(StorageError, match=r"Expert 7 of layer 2 .* ends early"):
        reading.read(2, 7)


def test_a_reader_that_breaks_in_an_unforeseen_way_leaves_nobody_waiting(reading):
    def broken(offset):
        raise RuntimeError("boom")

    reading.file.before = broken
    with pytest.raises(StorageError, match=r"Expert 0 of layer 0 .* boom"):
        reading.read(0, 0)
    reading.file.before = None
    reading.read(0, 0)


def test_reads_that_come_in_parts_are_put_together(model):
    index, content = model

    class Halting(FaultyFile):
        def read(self, into, offset):
            return super().read(into[: 4096 + 100] if len(into) > 4196 else into, offset)

    reading = Reading(Halting(content), index)
    reading.store._block = 4 * 4096
    assert reading.read(1, 4).memory.tobytes() == expected(content, index, 1, 4)
    reading.store.close()


def test_close_joins_the_readers_and_closes_the_file(model):
    index, content = model
    before = threading.active_count()
    reading = Reading(FaultyFile(content), index, threads=2)
    reading.submit(0, 0, demand=False)
    reading.store.close()
    assert threading.active_count() == before and reading.file.closed


# The real file


def test_o_direct_reads_the_bytes_of_the_file(tmp_path):
    path, index, content = write_model(tmp_path)
    file = RawFile(path, probe=BASE)
    assert file.direct, "these tests want a real disk under tmp_path"
    reading = Reading(file, index, threads=2)
    record = index[1, 1]
    memory = np.frombuffer(mmap.mmap(-1, record.size), np.uint8)
    with reading.lock:
        ticket = reading.store.submit(record, memory, demand=True)
    reading.wait(ticket)
    assert ticket.ready and memory.tobytes() == expected(content, index, 1, 1)
    reading.store.close()


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_file_system_that_refuses_o_direct_is_read_through_the_cache_and_said(tmp_path, monkeypatch, caplog, where):
    path, _, content = write_model(tmp_path)
    real_open, real_read, advised = os.open, os.preadv, []
    direct = set()

    def refuse(name, flags, *rest):
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = real_open(name, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def refuse_read(fd, buffers, offset):
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(raw.os, "open", refuse)
    monkeypatch.setattr(raw.os, "preadv", refuse_read)
    monkeypatch.setattr(raw.os, "posix_fadvise", lambda *a: advised.append(a[1:]))
    with caplog.at_level("WARNING"):
        file = RawFile(path, probe=BASE)
    assert not file.direct and "without O_DIRECT" in caplog.text
    direct.clear()
    into = bytearray(5000)
    assert file.read(memoryview(into), BASE) == 5000 and bytes(into) == content[BASE : BASE + 5000]
    assert advised == [(BASE, 5000, os.POSIX_FADV_DONTNEED)]
    file.close()


def test_buffered_reads_that_were_asked_for_need_no_warning(tmp_path, caplog):
    path, _, _ = write_model(tmp_path)
    file = RawFile(path, direct=False)
    assert not file.direct and not caplog.records
    file.close()


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(StorageError, match=r"gone\.refold cannot be opened"):
        RawFile(tmp_path / "gone.refold")
