"""The daemon as a real process: serves, stops, survives being killed, and says in one sentence what stands in its way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from cloud_double import RELEASE_KEY, Authority, Cloud
from daemon_process import DaemonProcess
from PIL import Image
from small_nets import images, shifted

from edge.directory import DataDirectory
from edge.outbox import Outbox
from refold import Release
from refold.cli import main
from refold.release import seal
from refold.v1 import adaptation_pb2 as pb

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(images(30, 16)):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def stream(tmp_path):
    np.savez(tmp_path / "stream.npz", images=images(64, 16, seed=1))
    return tmp_path / "stream.npz"


def test_a_folder_is_served_and_the_daemon_ends(bundle, factory, folder, tmp_path):
    from edge.serving import ServingState

    (folder / "zz.png").write_bytes(b"not a picture")
    with DaemonProcess("--bundle", bundle.path, "--source", folder, "--json", data=tmp_path / "data") as daemon:
        assert daemon.wait() == 0, daemon.said()
        status = json.loads(daemon.output)
    lines = daemon.lines()
    engine = factory.build(ServingState())
    logits = engine.run(bundle.preprocess.apply(images(30, 16)))
    assert [x["class"] for x in lines] == logits.argmax(1).tolist()
    assert [x["frame"] for x in lines] == list(range(30)) and lines[0]["label"].startswith("class ")
    assert [x["source"] for x in lines] == [f"{i:03}.png" for i in range(30)]
    assert status["metrics"]["frames"] == 30 and status["metrics"]["frames_lost"] == 0
    assert status["metrics"]["pictures_skipped"] == 1 and "zz.png" in status["last_skipped"] and "zz.png" in daemon.said()
    assert not status["running"] and status == daemon.status()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_everything_written(bundle, stream, tmp_path, number):
    with DaemonProcess(
        "--bundle", bundle.path, "--source", stream, "--loop", "--selector", "budget", data=tmp_path / "data"
    ) as daemon:
        daemon.until(lambda: len(daemon.lines()) > 200)
        assert daemon.end(number) == 0, daemon.said()
    status, lines = daemon.status(), daemon.lines()
    assert len(lines) == status["metrics"]["frames"] and [x["frame"] for x in lines] == list(range(len(lines)))
    outbox = Outbox(tmp_path / "data" / "outbox.sqlite")
    assert 0 < len(outbox) <= status["metrics"]["samples_stored"] and status["metrics"]["samples_failed"] == 0
    outbox.close()
    assert "Traceback" not in daemon.said()


def test_a_killed_daemon_starts_again_with_what_it_had(bundle, stream, tmp_path):
    arguments = ("--bundle", bundle.path, "--source", stream, "--loop", "--fps", "300", "--selector", "budget")
    with DaemonProcess(*arguments, data=tmp_path / "data") as daemon:
        daemon.until(lambda: daemon.status().get("metrics", {}).get("outbox_samples", 0) >= 5)
        kept = daemon.status()["metrics"]["outbox_samples"]
        daemon.end(signal.SIGKILL)
    served = len((tmp_path / "data" / "predictions.jsonl").read_text().splitlines())
    with DaemonProcess(*arguments, data=tmp_path / "data") as daemon:
        daemon.until(lambda: len(daemon.lines()) > served)
        daemon.until(lambda: daemon.status()["running"] and daemon.status()["metrics"]["uptime_s"] < 60)
        daemon.until(
            lambda: daemon.status()["metrics"]["outbox_samples"] >= kept, 5
        )  # the outbox opens beside the first frames
        assert daemon.end() == 0
    assert "damaged" not in daemon.said()


def test_pipes_in_its_way_are_not_waited_for(bundle, stream, tmp_path):
    """A domain bank that is a named pipe is left out; a bundle that is one is refused."""
    bank = DataDirectory(tmp_path).bank(bundle.digest)
    bank.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(bank)
    with DaemonProcess("--bundle", bundle.path, "--source", stream, data=tmp_path) as daemon:
        assert daemon.wait() == 0
        assert daemon.lines() and "is a named pipe" in daemon.said()
    os.mkfifo(tmp_path / "m.refold")
    with DaemonProcess("--bundle", tmp_path / "m.refold", "--source", stream, data=tmp_path) as daemon:
        assert daemon.wait() == 5 and "it is no regular file" in daemon.said()


def test_one_daemon_per_directory_and_status_tells(bundle, stream, tmp_path):
    data = tmp_path / "data"
    refold = [sys.executable, "-m", "refold.cli", "edge"]
    with DaemonProcess("--bundle", bundle.path, "--source", stream, "--loop", "--fps", "50", data=data) as daemon:
        daemon.until(lambda: daemon.status().get("running"))
        second = subprocess.run(
            [*refold, "run", "--data", data, "--bundle", bundle.path, "--source", stream],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2 and "Another daemon runs" in second.stderr
        told = subprocess.run([*refold, "status", "--data", data, "--json"], capture_output=True, text=True, check=True)
        assert json.loads(told.stdout)["running"] is True
        assert daemon.end() == 0
    told = subprocess.run([*refold, "status", "--data", data], capture_output=True, text=True, check=True)
    assert "running              False" in told.stdout and "frames_lost" in told.stdout
    none = subprocess.run([*refold, "status", "--data", tmp_path / "new"], capture_output=True, text=True, check=False)
    assert none.returncode == 2 and "No daemon has run" in none.stderr


def test_metrics_for_prometheus(bundle, stream, tmp_path):
    with DaemonProcess(
        "--bundle", bundle.path, "--source", stream, "--loop", "--fps", "200", "--metrics-port", "0", data=tmp_path / "data"
    ) as daemon:
        daemon.until(lambda: daemon.status().get("metrics", {}).get("frames", 0) > 10)
        port = daemon.status()["metrics_port"]
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        refused.value.close()
        assert daemon.end() == 0
    assert 'refold_edge_frames{bundle="' in text and "# TYPE refold_edge_latency_p99_ms gauge" in text


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--bundle", "nothing.refold"], 5, "no bundle at nothing.refold"),
        (["--bundle", "CUT"], 5, "truncated or not a Refold bundle"),
        (["--bundle", "GOOD", "--target", "ort-arm64"], 5, "no target 'ort-arm64'"),
        (["--bundle", "GOOD", "--source", "nowhere"], 2, "no source at nowhere"),
        (["--bundle", "GOOD", "--source", "WRONG"], 3, "takes exactly 16x16"),
        (["--bundle", "GOOD", "--data", "FILE"], 7, "data directory"),
        (["--bundle", "GOOD", "--predictions", "FILE/x"], 7, "Predictions cannot be written"),
        (["--bundle", "GOOD", "--fps", "-1"], 2, "source.fps"),
        (["--bundle", "GOOD", "--selector", "psychic"], 2, "psychic"),
        ([], 2, "No bundle to run"),
    ],
)
def test_what_stands_in_its_way_is_one_sentence_and_a_documented_code(
    bundle, stream, tmp_path, capsys, monkeypatch, arguments, code, sentence
):
    (tmp_path / "cut.refold").write_bytes(bundle.path.read_bytes()[:3000])
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "wrong.npz", images=images(2, 20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    names = {"GOOD": bundle.path, "CUT": "cut.refold", "WRONG": "wrong.npz", "FILE": "file", "FILE/x": "file/x"}
    with pytest.raises(SystemExit) as end:
        main(["edge", "run", "--data", "data", *(str(names.get(a, a)) for a in arguments)])
    assert end.value.code == code
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and said[-1].startswith("refold: ")


def test_a_device_with_a_cloud_uploads_follows_releases_and_rolls_back(bundle, stream, tmp_path):
    """Real TLS on loopback: samples and heartbeats go up, a signed release comes down and serves, an order takes it back."""
    authority, data = Authority(), tmp_path / "data"
    authority.identity().save(data / "identity")
    cloud = Cloud(authority)
    cloud.start()
    wanted: dict[str, object] = {"release": None, "exported": False}
    releases = [seal(Release(bundle.digest, "roof", v, shifted(bundle.norms, v)), RELEASE_KEY) for v in (1, 2)]

    def poll(request):
        if wanted["exported"] and request.installed_version:
            return pb.PollReleaseResponse(use_exported=True)
        release = wanted["release"]
        if release is not None and request.installed_version != release:
            return pb.PollReleaseResponse(release=releases[release - 1])
        return None

    cloud.answer_poll = poll
    config = tmp_path / "edge.toml"
    config.write_text(
        f'bundle = "{bundle.path}"\nsource.path = "stream.npz"\nsource.loop = true\nsource.fps = 200\n'
        f"[select]\nname = 'budget'\noptions = {{ rate = 0.2 }}\n[metrics]\nstatus_s = 0.1\n"
        f"[cloud]\naddress = 'localhost:{cloud.port}'\nlinger_s = 0.0\nheartbeat_s = 0.5\npoll_wait_s = 1.0\n"
        "retry_first_s = 0.2\n"
    )
    try:
        with DaemonProcess("--config", config, data=data) as daemon:
            daemon.until(lambda: cloud.samples and cloud.heartbeats)
            for version in (1, 2):
                wanted["release"] = version
                daemon.until(lambda v=version: daemon.version() == v)
            daemon.until(lambda: cloud.heartbeats[-1].release_version == 2)
            assert daemon.end(signal.SIGKILL) == -9
        with DaemonProcess("--config", config, data=data) as daemon:  # a restart serves release 2 before any cloud is asked
            daemon.until(lambda: daemon.status().get("metrics", {}).get("uptime_s", 99) < 30)
            daemon.until(lambda: daemon.version() == 2)
            (data / "rollback.request").write_text("by hand")
            wanted["release"] = None
            daemon.until(lambda: daemon.version() == 1)
            wanted["exported"] = True
            daemon.until(lambda: daemon.version() == 0)
            cloud.stop()
            served = len(daemon.lines())
            daemon.until(lambda: daemon.status()["last_error"] and daemon.status()["cloud"] == "away")
            daemon.until(lambda: len(daemon.lines()) > served + 50)
            assert daemon.end() == 0
        status = daemon.status()
        assert status["metrics"]["frames_lost"] == 0 and "Traceback" not in daemon.said()
    finally:
        cloud.stop()


def test_a_device_that_is_not_enrolled_works_alone_until_it_is(bundle, stream, tmp_path):
    authority, data = Authority(), tmp_path / "data"
    cloud = Cloud(authority)
    cloud.start()
    try:
        with DaemonProcess(
            "--bundle",
            bundle.path,
            "--source",
            stream,
            "--loop",
            "--fps",
            "100",
            "--cloud",
            f"localhost:{cloud.port}",
            data=data,
        ) as daemon:
            daemon.until(lambda: daemon.status().get("cloud") == "not enrolled" and daemon.lines())
            assert "enrol" in daemon.status()["last_error"]
            authority.identity().save(data / "identity")
            daemon.until(lambda: cloud.heartbeats and daemon.status()["cloud"] == "connected")
            assert daemon.end() == 0
    finally:
        cloud.stop()


def test_enrolment_from_the_command_line(tmp_path):
    authority = Authority()
    cloud = Cloud(authority, mutual=False)
    cloud.start()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    command = [sys.executable, "-m", "refold.cli", "edge", "enrol", "--data", tmp_path / "data", "--ca", tmp_path / "ca.pem"]
    command += ["--cloud", f"localhost:{cloud.port}", "--token"]
    try:
        done = subprocess.run([*command, "good"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Enrolled as" in done.stdout and "cohort roof" in done.stdout, done.stderr
        refused = subprocess.run([*command, "bad"], capture_output=True, text=True, check=False)
        assert refused.returncode == 9 and "Traceback" not in refused.stderr
    finally:
        cloud.stop()


def test_rollback_without_a_daemon_says_what_is_missing(bundle, tmp_path):
    command = [sys.executable, "-m", "refold.cli", "edge", "rollback", "--data", tmp_path, "--bundle", bundle.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "enrol" in done.stderr
    Authority().identity().save(tmp_path / "identity")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "exported state" in done.stderr


def test_the_device_runs_without_torch(bundle, stream, tmp_path):
    program = f"""
import sys
from refold.cli import main
try:
    main(["edge", "run", "--bundle", {str(bundle.path)!r}, "--source", {str(stream)!r}, "--data", {str(tmp_path / "d")!r}])
except SystemExit as e:
    assert not e.code, e.code
heavy = [m for m in ("torch", "onnx", "scipy", "sqlalchemy", "tritonclient", "psutil", "rich") if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_no_more_frames_are_kept_than_the_budget_can_carry(bundle, stream, tmp_path):
    from edge.daemon import Daemon
    from edge.select import innermost
    from edge.settings import load_settings

    flags = {
        "bundle": str(bundle.path), "data": str(tmp_path / "data"), "mode": "inline", "source": {"path": str(stream)},
        "select": {"name": "budget", "options": {"rate": 0.5}}, "outbox": {"bytes_per_hour": 10_000},
    }  # fmt: skip
    with Daemon(load_settings(None, flags, {})) as daemon:
        assert daemon.run() == 64
        kept = len(daemon.outbox)
        daemon.follow_budget()
        assert kept > 5 and innermost(daemon.path.selector).rate < 1e-3  # thousands of frames a second, a few samples an hour
    assert daemon.final_status["metrics"]["samples_stored"] == kept
