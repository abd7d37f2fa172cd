"""Lines of predictions: whole or not there, each once, whatever process and disk do in the middle of one."""

from __future__ import annotations

import errno
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from daemon_process import DaemonProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import images

from edge.frame_path import Prediction
from edge.sinks import JsonLines
from refold.errors import StorageError

PREDICTION = Prediction(3, 17, 'odd "name"\n', 1, 0.5, 0.69, 4, "d1", True, False, 0.4)


def frames(path: Path) -> list[int]:
    return [json.loads(line)["frame"] for line in path.read_text().splitlines()]


def test_a_torn_last_line_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "p.jsonl"
    sink = JsonLines(str(path))
    for i in range(3):
        sink.add(PREDICTION._replace(frame=i))
    sink.close()
    path.write_bytes(path.read_bytes()[:-40])
    again = JsonLines(str(path))
    again.add(PREDICTION._replace(frame=9))
    again.close()
    assert frames(path) == [0, 1, 9]


def test_a_killed_daemon_leaves_lines_and_the_next_one_adds_lines(bundle, tmp_path):
    np.savez(tmp_path / "stream.npz", images=images(64, 16, seed=1))
    arguments = ("--bundle", bundle.path, "--source", tmp_path / "stream.npz")
    with DaemonProcess(*arguments, "--loop", data=tmp_path / "data") as daemon:
        daemon.until(lambda: len(daemon.lines()) > 300)
        daemon.end(signal.SIGKILL)
    path = tmp_path / "data" / "predictions.jsonl"
    whole = path.read_bytes().count(b"\n")
    with path.open("ab") as f:  # where the kernel had taken a part of the last write
        f.write(path.read_bytes()[:70])
    with DaemonProcess(*arguments, data=tmp_path / "data") as daemon:
        assert daemon.wait() == 0
    told = frames(path)
    assert told[-64:] == list(range(64)) and len(told) in (whole + 64, whole + 65)
    assert "never finished" in daemon.said()


class Failing:
    """A file that takes some bytes, then fails as told."""

    def __init__(self, file, room: int, number: int) -> None:
        self._file, self._room, self._number = file, room, number

    def write(self, data: bytes) -> int:
        if self._room <= 0:
            raise OSError(self._number, os.strerror(self._number))
        n = min(self._room, len(data))
        self._room -= n
        return int(self._file.write(data[:n]))

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@given(
    room=st.integers(0, 2500),
    number=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS, errno.EBADF, errno.ESTALE]),
    more=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_after_any_error_each_line_is_there_once(tmp_path_factory, room, number, more):
    path = tmp_path_factory.mktemp("p") / "p.jsonl"
    sink = JsonLines(str(path))
    sink._file = Failing(sink._file, room, number)
    for i in range(10):
        sink.add(PREDICTION._replace(frame=i))
    with suppress(StorageError):
        sink.flush()
    if isinstance(sink._file, Failing):
        sink._file._room = 10**6  # the disk has room again
    for i in range(more):
        sink.add(PREDICTION._replace(frame=10 + i))
    sink.close()
    assert frames(path) == list(range(10 + more))


def test_a_pipe_without_a_reader_holds_nobody_up_and_gets_its_lines_later(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    sink = JsonLines(str(tmp_path / "pipe"))
    for i in range(3):
        sink.add(PREDICTION._replace(frame=i))
    with pytest.raises(StorageError, match="cannot be written"):
        sink.flush()
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    sink.flush()
    assert [json.loads(x)["frame"] for x in os.read(reader, 10_000).splitlines()] == [0, 1, 2]
    for i in range(2000):
        sink.add(PREDICTION._replace(frame=i))
    with pytest.raises(StorageError, match="behind"):
        sink.flush()
    got = b""
    for _ in range(100):
        try:
            got += os.read(reader, 2**20)
            sink.flush()
        except (StorageError, BlockingIOError):
            continue
    assert [json.loads(x)["frame"] for x in got.splitlines()] == list(range(2000))
    os.close(reader)
    sink.close()


def test_a_folder_that_appears_later_is_written_to(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "loop").symlink_to("loop")  # ELOOP: neither a file nor a directory in the way
    sink = JsonLines(str(tmp_path / "sub" / "loop"))
    sink.add(PREDICTION)
    with pytest.raises(StorageError):
        sink.flush()
    (tmp_path / "sub" / "loop").unlink()
    sink.close()
    assert frames(tmp_path / "sub" / "loop") == [3]
    with pytest.raises(StorageError, match="cannot be written"):
        JsonLines(str(tmp_path / "sub"))
