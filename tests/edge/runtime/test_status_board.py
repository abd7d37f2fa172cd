"""The status is told, dated and believed only as far as it deserves, whatever the disk, a lock or the clock does."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from daemon_process import DaemonProcess
from hypothesis import given
from hypothesis import strategies as st
from small_disk import SmallDisk
from small_nets import images

from edge.directory import DataDirectory
from edge.outbox import Outbox
from edge.runtime import Board, Latest, bounded, judge, stamp
from edge.runtime.query import find_status
from edge.runtime.status_socket import StatusSocket, ask
from refold.errors import StorageError, UsageError


@pytest.fixture
def arguments(bundle, tmp_path):
    np.savez(tmp_path / "stream.npz", images=images(64, 16, seed=1))
    rate = ("--fps", "100", "--loop", "--selector", "budget")
    return ("--bundle", bundle.path, "--source", tmp_path / "stream.npz", *rate)


def status_command(data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refold.cli", "edge", "status", "--data", str(data), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_database_that_is_locked_while_it_runs_stops_neither_status_nor_metrics(arguments, tmp_path):
    data = tmp_path / "data"
    with DaemonProcess(*arguments, "--metrics-port", "0", data=data) as daemon:
        daemon.until(lambda: daemon.status().get("metrics", {}).get("outbox_samples", 0) > 0)
        other = sqlite3.connect(data / "outbox.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        daemon.until(lambda: "locked" in daemon.status()["last_error"])
        before = daemon.status()
        daemon.until(lambda: daemon.status()["metrics"]["frames"] > before["metrics"]["frames"] + 20)
        assert daemon.status()["boot_s"] > before["boot_s"] and daemon.status()["pid"] == daemon.process.pid
        url = f"http://127.0.0.1:{before['metrics_port']}/metrics"
        for _ in range(3):
            began = time.monotonic()
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            assert "refold_edge_outbox_samples" in text and time.monotonic() - began < 5
        other.close()
        daemon.until(lambda: daemon.status()["last_error"] == "")
        assert daemon.end() == 0


def test_a_disk_that_hangs_stops_neither_frames_nor_what_is_said_and_a_second_daemon_ends(arguments, tmp_path):
    with SmallDisk(tmp_path / "disk", "ext4") as disk:
        data = disk.root / "data"
        with DaemonProcess(*arguments, data=data, beside=tmp_path / "beside") as daemon:
            daemon.until(lambda: daemon.asked().get("metrics", {}).get("outbox_samples", 0) > 0)
            disk.freeze()
            try:
                daemon.until(lambda: any("waited" in problem for problem in daemon.asked()["problems"]))
                served = daemon.asked()["metrics"]["frames"]
                daemon.until(lambda: daemon.asked()["metrics"]["frames"] > served + 20 and len(daemon.lines()) > served)
                told = status_command(data, "--json")
                assert told.returncode == 0 and json.loads(told.stdout)["running"] and json.loads(told.stdout)["last_error"]
                with DaemonProcess(*arguments, data=data, beside=tmp_path / "second") as second:
                    second.until(lambda: len(second.lines()) > 5)  # it cannot see yet that another one is there
                    disk.thaw()
                    assert second.wait() == 2 and "Another daemon runs" in second.said().splitlines()[-1]
            finally:
                disk.thaw()
            daemon.until(lambda: daemon.asked()["problems"] == [])
            assert daemon.end() == 0 and daemon.status()["pid"] == daemon.process.pid
        assert "Traceback" not in daemon.said() + second.said()


@pytest.mark.slow  # it waits for the ten seconds that an end is given
def test_a_disk_that_hangs_does_not_keep_a_daemon_from_ending(arguments, tmp_path):
    with SmallDisk(tmp_path / "disk", "ext4") as disk:
        with DaemonProcess(*arguments, data=disk.root / "data", beside=tmp_path / "beside") as daemon:
            daemon.until(lambda: daemon.asked().get("metrics", {}).get("outbox_samples", 0) > 0)
            disk.freeze()
            try:
                daemon.until(lambda: any("waited" in problem for problem in daemon.asked()["problems"]))
                daemon.process.send_signal(signal.SIGTERM)
                daemon.until_said("Served")  # from here on only the kernel keeps the process, for its thread in the disk
                assert "given up" in daemon.said() and "Still wrong at the end" in daemon.said()
            finally:
                disk.thaw()
            assert daemon.wait() == 0
        assert "Traceback" not in daemon.said()


def test_a_disk_that_hangs_at_the_start_is_left_for_later(arguments, tmp_path):
    with SmallDisk(tmp_path / "disk", "ext4") as disk:
        data = disk.root / "data"
        Outbox(data / "outbox.sqlite").close()
        (data / "daemon.lock").touch()
        disk.freeze()
        try:
            with DaemonProcess(*arguments, data=data, beside=tmp_path / "beside") as daemon:
                daemon.until(lambda: len(daemon.lines()) > 20)
                daemon.until(lambda: any("waited" in problem for problem in daemon.asked()["problems"]))
                assert "does not answer: beginning without it" in daemon.said()
                disk.thaw()
                daemon.until(lambda: daemon.asked()["problems"] == [] and daemon.asked()["metrics"]["outbox_samples"] > 0)
                assert daemon.end() == 0
        finally:
            disk.thaw()


def test_a_killed_daemon_is_stale_and_so_is_one_that_hangs(arguments, tmp_path):
    data = tmp_path / "data"
    with DaemonProcess(*arguments, data=data) as daemon:
        daemon.until(lambda: daemon.status().get("running"))
        daemon.end(signal.SIGKILL)
    told = status_command(data, "--json")
    status = json.loads(told.stdout)
    assert told.returncode == 11 and "Stale since" in told.stderr and "no daemon runs here" in told.stderr
    assert status["running"] is False and status["stale"] == "died" and status["stale_since_unix_ms"] > 0
    told = status_command(data)
    assert told.returncode == 11 and "stale                died" in told.stdout
    status |= {"boot_s": stamp(0)["boot_s"] - 60, "every_s": 2.0, "running": True}
    (data / "status.json").write_text(json.dumps(status))
    directory = DataDirectory(data)  # a daemon that holds the directory, does not answer and last wrote a minute ago
    directory.lock()
    try:
        told = status_command(data)
        assert told.returncode == 11 and "(6" in told.stderr and "neither be asked nor write" in told.stderr
        (data / "status.json").unlink()
        with pytest.raises(UsageError, match="A daemon runs"):
            find_status(data)
    finally:
        directory.unlock()


@given(
    running=st.booleans(),
    held=st.sampled_from([True, False, None]),
    age=st.floats(0, 1e6),
    jump=st.integers(-(10**12), 10**12),
    every=st.floats(0.1, 3600),
    same_boot=st.booleans(),
)
def test_within_a_boot_no_clock_setting_makes_a_status_older_or_younger(running, held, age, jump, every, same_boot):
    status = {"running": running, "boot_id": "a", "boot_s": 5.0, "unix_ms": 10**12, "every_s": every}
    answer = judge(
        status,
        held=held,
        answered=False,
        now_unix_ms=10**12 + jump,
        boot_id="a" if same_boot else "b",
        boot_s=5.0 + age,
        pid_exists=True,
    )
    if same_boot:
        assert answer.age_s == pytest.approx(age, abs=1e-6)
        if held and running:
            assert (answer.reason == "silent") == (answer.age_s > max(10.0, 3 * every))
    if held is False:
        assert not answer.running and answer.reason == ("died" if running else "")
    if held is None:
        assert answer.running == (running and same_boot)
    assert answer.age_s >= 0 and bool(answer.sentence()) == bool(answer.reason)


def test_a_status_of_an_older_version_is_dated_by_the_wall_clock():
    now = 1_700_000_100_000
    old = {"running": True, "unix_ms": now - 50_000}
    answer = judge(old, held=True, answered=False, now_unix_ms=now, boot_id="b", boot_s=1.0)
    assert answer.age_s == 50 and answer.reason == "silent" and answer.since_unix_ms == now - 50_000


@pytest.mark.parametrize(
    "content", ["{}", '{"running":true,"unix_ms":"x"}', '{"unix_ms":1,"boot_s":[]}', "[1]", "", "[" * 9000]
)
def test_what_no_daemon_wrote_is_no_status(content, tmp_path):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UsageError, match="cannot be read"):
        find_status(tmp_path)


def test_a_pipe_in_the_place_of_the_status_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "status.json")
    with pytest.raises(UsageError, match="a named pipe"):
        find_status(tmp_path)


def test_a_status_of_the_future_is_not_dated_by_it(tmp_path):
    (tmp_path / "status.json").write_text('{"running": true, "unix_ms": 99999999999999}')
    told, staleness = find_status(tmp_path)
    assert told["stale"] == "died" and staleness.since_unix_ms <= time.time_ns() // 1_000_000


def test_a_bounded_task_is_waited_for_only_so_long_and_its_error_is_told():
    ended, go = threading.Event(), threading.Event()

    def task() -> None:
        go.wait(10)
        ended.set()

    assert not bounded("test", task, 0.01) and not ended.is_set()
    go.set()
    assert ended.wait(10) and bounded("test", task, 10)
    with pytest.raises(ZeroDivisionError):
        bounded("test", lambda: 1 // 0, 10)


def test_a_lock_that_is_held_for_ever_delays_nobody():
    held, asked = threading.Lock(), threading.Event()

    def ask_it() -> int:
        asked.set()
        with held:
            return 7

    latest = Latest("numbers", ask_it, 0)
    with held:
        assert latest.get(0.01) == 0 and asked.wait(5)
        time.sleep(0.02)
        assert latest.get(0.01) == 0 and latest.waiting_s > 0.01
    deadline = time.monotonic() + 10
    while latest.get() != 7:
        assert time.monotonic() < deadline
    assert latest.waiting_s == 0 or latest.get() == 7
    latest.close()


def test_a_question_that_fails_keeps_the_value_before_and_says_why(caplog):
    answers = iter([3, KeyError("x"), KeyError("x"), 4])

    def ask_it() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    latest = Latest("numbers", ask_it, 0)
    assert latest.get(5) == 3 and latest.error == ""
    assert latest.get(5) == 3 and "KeyError" in latest.error
    assert latest.get(5) == 3 and latest.get(5) == 4 and latest.error == ""
    assert len(caplog.records) == 1
    latest.close()


def test_a_board_says_goodbye_even_when_what_it_collects_fails(tmp_path, caplog):
    answers = iter([{"model": "a"}])
    board = Board(tmp_path / "status.json", lambda: next(answers), 0.01)
    board.start()
    deadline = time.monotonic() + 10
    while "status_error" not in (ask(tmp_path) or {}):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    last = board.close()
    assert last["model"] == "a" and last["running"] is False
    assert json.loads((tmp_path / "status.json").read_text()) == last and ask(tmp_path) is None


def test_a_name_that_is_taken_is_said_and_a_moved_directory_is_followed(tmp_path):
    first = StatusSocket(tmp_path / "new", lambda: b'{"a": 1}')
    first.follow()
    second = StatusSocket(tmp_path / "new", lambda: b'{"a": 2}')
    with pytest.raises(StorageError, match="over a socket"):
        second.follow()
    assert ask(tmp_path / "new") == {"a": 1}
    (tmp_path / "new").mkdir()
    assert ask(tmp_path / "new") is None
    first.follow()
    assert ask(tmp_path / "new") == {"a": 1}
    first.close()
    assert ask(tmp_path / "new") is None
    second.follow()
    assert ask(tmp_path / "new") == {"a": 2}
    second.close()


def test_another_users_answer_is_not_believed(tmp_path, monkeypatch):
    board = StatusSocket(tmp_path, lambda: b"{}")
    board.follow()
    assert ask(tmp_path) == {}
    monkeypatch.setattr("edge.runtime.status_socket._trusted", lambda peer, directory: False)
    assert ask(tmp_path) is None
    board.close()


def test_looking_at_a_directory_neither_makes_it_nor_keeps_a_daemon_out(tmp_path):
    with pytest.raises(UsageError, match="No daemon has run"):
        find_status(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    daemon, looker = DataDirectory(tmp_path), DataDirectory(tmp_path)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            _ = looker.locked_by_another

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(20):
            daemon.lock()
            daemon.unlock()
    finally:
        stop.set()
        thread.join()
    daemon.lock()
    assert looker.locked_by_another and not daemon.locked_by_another
    with pytest.raises(UsageError, match="Another daemon"):
        looker.lock()
    old = os.open(tmp_path / "daemon.lock", os.O_RDWR)
    os.close(old)
    daemon.unlock()
    assert not looker.locked_by_another
