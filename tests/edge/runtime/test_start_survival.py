"""Whatever a daemon survives while it runs, it survives at its start: it serves, says what is wrong, and recovers by itself."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cloud_double import RELEASE_KEY, Authority, Cloud
from daemon_process import DaemonProcess
from small_disk import SmallDisk
from small_nets import images, shifted

from edge.daemon import Daemon
from edge.directory import DataDirectory
from edge.frame_path import Frame, Prediction
from edge.outbox import Outbox
from edge.select import Verdict
from edge.settings import load_settings
from edge.sinks import JsonLines
from refold import Release
from refold.errors import StorageError
from refold.release import seal
from refold.v1 import adaptation_pb2 as pb
from refold.v1 import samples_pb2


@pytest.fixture
def disk(tmp_path):
    with SmallDisk(tmp_path / "disk", options="size=2m,nr_inodes=200") as disk:
        yield disk


@pytest.fixture
def arguments(bundle, tmp_path):
    np.savez(tmp_path / "stream.npz", images=images(64, 16, seed=1))
    rate = ("--fps", "100", "--loop", "--selector", "budget")
    return ("--bundle", bundle.path, "--source", tmp_path / "stream.npz", *rate)


@contextmanager
def a_life(arguments, data: Path, tmp_path: Path, name: str):
    """A daemon that served at least once; its predictions and log lie outside the disk."""
    with DaemonProcess(*arguments, data=data, beside=tmp_path / name) as daemon:
        daemon.until(lambda: len(daemon.lines()) > 10)
        yield daemon


def until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def stored(daemon: DaemonProcess) -> float:
    return float(daemon.asked().get("metrics", {}).get("outbox_samples", 0))


def wrong_then_well(daemon: DaemonProcess, lift, sentence: str) -> None:
    """It serves, tells why something is wrong (once in the log), and is well again after `lift`."""
    daemon.until(lambda: any(sentence in p for p in daemon.asked().get("problems", [])))
    served = len(daemon.lines())
    daemon.until(lambda: len(daemon.lines()) > served + 20)
    said = Counter(line.partition("WARNING")[2] for line in daemon.said().splitlines() if "WARNING" in line)
    assert any(sentence in line for line in said) and max(said.values()) == 1, said
    lift()
    daemon.until(lambda: daemon.asked().get("problems") == [] and stored(daemon) > 0)
    assert daemon.asked()["metrics"]["samples_failed"] == 0
    assert daemon.end() == 0, daemon.said()
    assert daemon.status()["running"] is False and "Traceback" not in daemon.said()


def test_a_restart_with_a_full_disk(arguments, disk, tmp_path):
    Outbox(disk.root / "data" / "outbox.sqlite").close()
    disk.fill()
    with a_life(arguments, disk.root / "data", tmp_path, "first") as daemon:
        wrong_then_well(daemon, disk.free, "disk is full")


def test_a_kill_on_a_disk_that_is_full_by_then(arguments, disk, tmp_path):
    with a_life(arguments, disk.root / "data", tmp_path, "first") as daemon:
        daemon.until(lambda: stored(daemon) > 0)
        disk.fill()
        daemon.until(lambda: daemon.asked()["problems"])
        kept = stored(daemon)
        daemon.end(signal.SIGKILL)
    with a_life(arguments, disk.root / "data", tmp_path, "second") as daemon:
        daemon.until(lambda: stored(daemon) >= kept)  # what was acknowledged is read on a full disk
        wrong_then_well(daemon, disk.free, "disk is full")


@pytest.mark.parametrize("state", ["read-only", "no inodes"])
def test_a_first_start_on_a_disk_that_takes_nothing(arguments, disk, tmp_path, state):
    {"read-only": lambda: disk.read_only(True), "no inodes": disk.use_all_inodes}[state]()
    with a_life(arguments, disk.root / "data", tmp_path, "first") as daemon:
        lift = (lambda: disk.read_only(False)) if state == "read-only" else disk.free
        wrong_then_well(daemon, lift, "Read-only" if state == "read-only" else "cannot be")


def test_a_locked_database(arguments, tmp_path):
    data = tmp_path / "data"
    Outbox(data / "outbox.sqlite").close()
    other = sqlite3.connect(data / "outbox.sqlite", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with a_life(arguments, data, tmp_path, "first") as daemon:
        wrong_then_well(daemon, other.close, "locked")


def test_a_directory_in_the_place_of_every_state_file(arguments, bundle, tmp_path):
    data = tmp_path / "data"
    names = ("outbox.sqlite", "status.json", "daemon.lock", f"adapter-{bundle.digest[:16]}")
    for name in names:
        (data / name / "full").mkdir(parents=True)
    (data / "cache").write_text("a file in the place of a directory")

    def lift():
        for name in names:
            (data / name / "full").rmdir()
            (data / name).rmdir()

    with a_life(arguments, data, tmp_path, "first") as daemon:
        daemon.until(lambda: any("status.json cannot be written" in p for p in daemon.asked()["problems"]))
        wrong_then_well(daemon, lift, "outbox.sqlite cannot be used")


def test_a_damaged_outbox_is_set_aside_while_frames_are_served(arguments, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "outbox.sqlite").write_bytes(os.urandom(9000))
    with a_life(arguments, tmp_path / "data", tmp_path, "first") as daemon:
        daemon.until(lambda: stored(daemon) > 0)
        assert daemon.end() == 0
    assert (tmp_path / "data" / "outbox.sqlite.damaged").is_file() and "set aside" in daemon.said()


def test_predictions_wait_for_their_disk(bundle, disk, tmp_path):
    np.savez(tmp_path / "stream.npz", images=images(40, 16, seed=1))
    disk.read_only(True)
    path = disk.root / "predictions.jsonl"
    command = [sys.executable, "-m", "refold.cli", "edge", "run", "--bundle", bundle.path, "--source", tmp_path / "stream.npz"]
    command += ["--data", tmp_path / "data", "--predictions", path, "--fps", "20"]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)
    try:
        first = process.stderr.readline()
        while "Predictions cannot be written" not in first:
            assert process.poll() is None
            first = process.stderr.readline()
        disk.read_only(False)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Predictions" not in said
    assert [json.loads(line)["frame"] for line in path.read_text().splitlines()] == list(range(40))


def test_a_device_with_a_release_restarts_on_a_full_disk_and_finds_its_release_again(arguments, bundle, disk, tmp_path):
    authority, data = Authority(), disk.root / "data"
    authority.identity().save(data / "identity")
    cloud = Cloud(authority)
    cloud.start()
    signed = seal(Release(bundle.digest, "roof", 1, shifted(bundle.norms, 1)), RELEASE_KEY)
    cloud.answer_poll = lambda request: None if request.installed_version else pb.PollReleaseResponse(release=signed)
    with_cloud = (*arguments, "--cloud", f"localhost:{cloud.port}")
    quick = {"REFOLD_EDGE_CLOUD__POLL_WAIT_S": "1", "REFOLD_EDGE_CLOUD__RETRY_FIRST_S": "0.2"}
    try:
        with DaemonProcess(*with_cloud, data=data, beside=tmp_path / "first", **quick) as daemon:
            daemon.until(lambda: daemon.version() == 1)
            assert daemon.end() == 0
        cloud.answer_poll = lambda request: None
        (state,) = (data / "updates").glob("*/updates.sqlite")
        other = sqlite3.connect(state, isolation_level=None)
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with DaemonProcess(*with_cloud, data=data, beside=tmp_path / "locked", **quick) as daemon:
            daemon.until(lambda: len(daemon.lines()) > 10 and "locked" in daemon.asked().get("last_error", ""))
            assert daemon.version() == 0  # nothing says which release this device may run
            other.close()
            daemon.until(lambda: daemon.version() == 1 and daemon.asked()["cloud"] == "connected")
            assert daemon.end() == 0
        disk.fill()
        with DaemonProcess(*with_cloud, data=data, beside=tmp_path / "second", **quick) as daemon:
            daemon.until(lambda: len(daemon.lines()) > 10)
            assert daemon.version() in (0, 1)  # as exported, or the release it can prove
            daemon.until(lambda: daemon.asked().get("problems"))
            disk.free()
            daemon.until(lambda: daemon.version() == 1 and daemon.asked()["cloud"] == "connected")
            assert daemon.end() == 0
        assert "Traceback" not in daemon.said()
    finally:
        cloud.stop()


def test_without_permission_everything_is_said_and_tried_again(tmp_path):
    """As another user than the directory's."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    tmp_path.chmod(0o700)
    data = DataDirectory(tmp_path / "data")
    os.seteuid(65534)
    try:
        data.check()
        with pytest.raises(StorageError, match="Permission denied"):
            data.lock()
        assert data.locked_by_another is False
        outbox = Outbox(data.outbox, later=True)
        with pytest.raises(StorageError, match="Permission denied"):
            outbox.open()
        assert len(outbox) == 0
        sink = JsonLines(str(tmp_path / "p.jsonl"))
        sink.add(Prediction(0, 0, "", 0, 1.0, 0.0, 0, "d0", False, False, 0.0))
        with pytest.raises(StorageError, match="Permission denied"):
            sink.flush()
    finally:
        os.seteuid(0)
    data.lock()
    outbox.database._again = 0.0
    outbox.open()
    sink.close()
    assert outbox.database.writable and (tmp_path / "p.jsonl").read_text().count("\n") == 1
    outbox.close()
    data.unlock()


def test_a_file_in_the_way_of_the_directory_is_a_mistake_and_not_a_disk(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="is not a directory"):
            DataDirectory(path).check()


def test_samples_and_statistics_wait_for_a_disk_and_reach_it_without_another_frame(bundle, tmp_path):
    data = tmp_path / "data"
    (data / "outbox.sqlite" / "full").mkdir(parents=True)
    flags = {"bundle": str(bundle.path), "data": str(data), "source": {"path": "none"}, "select": {"name": "budget"}}
    with Daemon(load_settings(None, flags, {})) as daemon:
        answer = Prediction(0, 0, "", 0, 1.0, 0.0, 0, "d0", False, True, 0.0)
        for i, picture in enumerate(images(3, 16)):
            assert daemon.samples.add(Frame(i, picture, str(i), 1000), Verdict(True, 1.0, 0.5, "kept", False), answer)
        report = samples_pb2.StatisticsReport(bundle_digest="b", release_version=1, domain="d1", digest="x")
        daemon._keep_report(report)
        until(lambda: any("outbox.sqlite" in problem for problem in daemon.problems()))
        (data / "outbox.sqlite" / "full").rmdir()
        (data / "outbox.sqlite").rmdir()
        until(lambda: len(daemon.outbox) == 3 and daemon.outbox.reports(2) == [report] and not daemon.problems())
        assert daemon.samples.failed == 0
