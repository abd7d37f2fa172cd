"""The watch over a device process: real processes that write real prediction lines, an Admin service of plain values."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from demo import watch as module
from demo.plan import make_plan
from demo.processes import Processes
from demo.tally import Tally
from demo.view import Scene
from demo.watch import Watch
from refold.errors import RefoldError
from refold.v1 import admin_pb2 as pb

PLAN = make_plan(400)
DEVICE = """
import json, sys, time
frames, path, status = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with open(path, "a") as f:
    for i in range(frames):
        version = 0 if i < 100 else 1 if i < 300 else 2
        f.write(json.dumps({"frame": i, "class": i % 10, "entropy": 0.5, "release_version": version, "domain": "d1"}) + "\\n")
        f.flush()
print("the device's last word", flush=True)
sys.exit(status)
"""


class SilentView:
    def __init__(self) -> None:
        self.scenes: list[Scene] = []

    def __enter__(self) -> SilentView:
        return self

    def __exit__(self, *args: object) -> None: ...

    def step(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def show(self, scene: Scene) -> None:
        self.scenes.append(scene)


class PlainAdmin:
    def __init__(self, away: bool = False) -> None:
        self.away = away

    def status(self) -> pb.StatusResponse | None:
        if self.away:
            return None
        devices = [pb.DeviceStatus(device_id="cam", metrics={"link_bytes_up": 5000.0, "link_bytes_down": 700.0})]
        return pb.StatusResponse(devices=devices, cohorts=[pb.CohortStatus(samples=12)])

    def releases(self) -> pb.ListReleasesResponse | None:
        if self.away:
            return None
        rows = [pb.ReleaseRow(version=v, domain="d1", bytes=350, digest=f"{v}" * 64) for v in (1, 2)]
        return pb.ListReleasesResponse(releases=rows)


def _watch(tmp_path: Path, frames: int, status: int = 0, away: bool = False) -> tuple[Watch, Processes]:
    processes = Processes(tmp_path)
    lines = tmp_path / "predictions.jsonl"
    device = processes.start("device", [sys.executable, "-c", DEVICE, str(frames), str(lines), str(status)])
    tally = Tally(PLAN, np.arange(400) % 10, np.zeros(400, np.int64))
    return Watch(tally, lines, PlainAdmin(away), SilentView(), device), processes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK", 0.0)
    monkeypatch.setattr(module, "REFRESH", 0.01)


def test_every_answer_and_every_release_is_seen(tmp_path: Path) -> None:
    watch, processes = _watch(tmp_path, 400)
    with processes:
        watch.run()
    watch.ask()
    assert watch.tally.lost == 0 and watch.tally.accuracy(0, 400) == (100.0, 10.0)
    assert [(a.version, a.frame, a.bytes, a.digest[:2]) for a in watch.arrivals] == [(1, 100, 350, "11"), (2, 300, 350, "22")]
    assert (watch.traffic.samples, watch.traffic.bytes_up, watch.traffic.bytes_down) == (12, 5000, 700)


def test_a_release_kept_for_later_counts_from_its_installation(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"release_version": 2, "metrics": {"link_bytes_up": 9}}))
    processes = Processes(tmp_path)
    lines = tmp_path / "predictions.jsonl"
    tally = Tally(PLAN, np.zeros(400, np.int64), np.zeros(400, np.int64))
    with processes:
        device = processes.start("device", [sys.executable, "-c", "import time; time.sleep(60)"])
        watch = Watch(tally, lines, PlainAdmin(), SilentView(), device, status=tmp_path / "status.json")
        watch.ask()
        row = {"frame": 50, "class": 0, "entropy": 0.1, "release_version": 2, "domain": "d1"}
        lines.write_text(json.dumps(row) + "\n")
        watch.read()
    assert [(a.version, a.frame, a.installed) for a in watch.arrivals] == [(2, 50, 0)] and watch.traffic.bytes_up == 9


def test_a_cloud_that_does_not_answer_costs_only_what_it_knows(tmp_path: Path) -> None:
    watch, processes = _watch(tmp_path, 400, away=True)
    with processes:
        watch.run()
    assert watch.tally.lost == 0 and [a.version for a in watch.arrivals] == [1, 2] and not watch.arrivals[0].digest


def test_frames_that_never_came_are_lost_not_waited_for(tmp_path: Path) -> None:
    watch, processes = _watch(tmp_path, 390)
    with processes:
        watch.run()
    assert watch.tally.lost == 10


def test_a_device_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    watch, processes = _watch(tmp_path, 5, status=7)
    with processes, pytest.raises(RefoldError, match=r"exit 7\): the device's last word"):
        watch.run()
    assert watch.tally.seen == 5


def test_silence_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with Processes(tmp_path) as processes:
        device = processes.start("device", [sys.executable, "-c", "import time; time.sleep(60)"])
        tally = Tally(PLAN, np.zeros(400, np.int64), np.zeros(400, np.int64))
        with pytest.raises(RefoldError, match="silent"):
            Watch(tally, tmp_path / "none", PlainAdmin(), SilentView(), device).run()


def test_another_process_that_ends_stops_the_run(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        cloud = processes.start("cloud", [sys.executable, "-c", "print('no disk'); raise SystemExit(7)"])
        device = processes.start("device", [sys.executable, "-c", "import time; time.sleep(60)"])
        tally = Tally(PLAN, np.zeros(400, np.int64), np.zeros(400, np.int64))
        with pytest.raises(RefoldError, match=r"cloud process ended by itself \(exit 7\): no disk"):
            Watch(tally, tmp_path / "none", PlainAdmin(), SilentView(), device, (cloud,)).run()
