"""A replayed file waits for the device's own adaptation: every look is taken, and two replays give the same predictions."""

from __future__ import annotations

import json
import lzma
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from small_nets import images

from edge.adapt import ImageObserver
from edge.cli import edge
from edge.daemon import Daemon
from edge.settings import load_settings
from edge.sources import NoSource, Stream, open_source
from edge.sources.video import VideoSource
from edge.worker import Waiting, Worker
from refold import Preprocess
from refold.errors import StorageError

SHIFT = 80  # frames before the surroundings change
NAMES = ("unix_ms", "latency_ms")  # of a prediction, which no two runs share


@pytest.fixture
def stream(tmp_path):
    clean, dark = images(SHIFT, 16, seed=1), images(240, 16, seed=2) // 3
    np.savez(tmp_path / "stream.npz", images=np.concatenate([clean, dark]))
    return tmp_path / "stream.npz"


@pytest.fixture
def slow_looks(monkeypatch):
    """Looks that take longer than frames, as on a device with one core."""
    observe = ImageObserver.observe

    def slowly(self, *args):
        time.sleep(0.001)
        return observe(self, *args)

    monkeypatch.setattr(ImageObserver, "observe", slowly)


def replay(bundle, stream, data, **flags):
    values = {
        "bundle": str(bundle.path),
        "data": str(data),
        "predictions": {"path": str(data / "predictions.jsonl")},
        "adapt": {"probe_frames": 8, "watch_every": 1, "burst": 32},
        **flags,
    }
    values["source"] = {"path": str(stream), **flags.get("source", {})}
    data.mkdir()
    with Daemon(load_settings(None, values, {})) as daemon:
        daemon.run()
    lines = [json.loads(line) for line in (data / "predictions.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in NAMES} for line in lines], daemon.final_status


def test_two_replays_are_the_same_and_miss_no_look(bundle, stream, tmp_path, slow_looks):
    first, status = replay(bundle, stream, tmp_path / "a")
    second, _ = replay(bundle, stream, tmp_path / "b")
    inline, inline_status = replay(bundle, stream, tmp_path / "c", mode="inline")
    assert first == second == inline
    assert status["frames_wait"] and status["looks_dropped"] == status["metrics"]["frames_unwatched"] == 0
    assert status["metrics"]["adapt_images_kept"] == inline_status["metrics"]["adapt_images_kept"] > 16
    assert any(line["overlay"] for line in first) and first[0]["domain"] != first[-1]["domain"]


def test_a_folder_is_replayed_as_an_array_is(bundle, tmp_path, slow_looks):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(np.concatenate([images(40, 16, seed=1), images(80, 16, seed=2) // 3])):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    first, status = replay(bundle, folder, tmp_path / "a")
    second, _ = replay(bundle, folder, tmp_path / "b", mode="inline")
    assert first == second and status["frames_wait"] and status["looks_dropped"] == 0


def test_a_pace_or_a_wish_lets_frames_go_first_and_the_last_line_tells_what_was_dropped(bundle, stream, tmp_path, slow_looks):
    for i, source in enumerate(({"waits": "no"}, {"fps": 5000.0})):
        _, status = replay(bundle, stream, tmp_path / str(i), source=source)
        assert not status["frames_wait"] and status["looks_dropped"] > 0
    arguments = ["run", "--bundle", str(bundle.path), "--source", str(stream), "--data", str(tmp_path / "cli")]
    shift = ["--set", "adapt.watch_every=1", "--set", "adapt.probe_frames=8"]
    said = CliRunner().invoke(edge, [*arguments, *shift, "--fps", "5000"]).output
    assert "looks at frames were dropped" in said and "without --fps waits" in said
    told = json.loads(CliRunner().invoke(edge, [*arguments, *shift, "--fps", "5000", "--json"]).stdout)
    assert told["looks_dropped"] > 0 and not told["frames_wait"]
    assert "dropped" not in CliRunner().invoke(edge, [*arguments, *shift]).output


def test_which_sources_are_replayed(tmp_path, monkeypatch):
    preprocess = Preprocess(16, 16)
    Image.fromarray(images(1, 16)[0]).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", images(2, 16))
    assert open_source(str(tmp_path), preprocess).replayed and open_source(str(tmp_path / "a.png"), preprocess).replayed
    assert open_source(str(tmp_path / "a.npy"), preprocess).replayed
    assert not open_source(str(tmp_path), preprocess, watch=True).replayed and not NoSource().replayed
    assert not Stream(lambda: open_source(str(tmp_path / "a.npy"), preprocess), fps=5).replayed

    class Capture:
        def __init__(self, origin):
            pass

        def isOpened(self):  # noqa: N802  (OpenCV's name)
            return True

        def release(self):
            pass

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Capture))
    (tmp_path / "a.mp4").write_bytes(b"x")
    for origin, live in ((tmp_path / "a.mp4", False), (0, True), (Path("/dev/null"), True)):
        source = VideoSource(origin, preprocess)
        assert (source.live, source.replayed) == (live, not live)


def test_a_fault_of_the_adaptation_does_not_end_a_replay(caplog):
    runner = Waiting()

    def fails():
        raise ZeroDivisionError("nobody foresaw it")

    def full():
        raise StorageError("The disk is full.")

    assert runner.offer(fails) and "nobody foresaw it" in runner.last_error and "nobody foresaw it" in caplog.text
    assert runner.offer(full) and runner.last_error == "The disk is full."
    assert not isinstance(runner, Worker)


@pytest.mark.slow
def test_a_real_network_adapts_to_a_file_as_to_a_camera(data_folder, tmp_path):
    """ResNet-20 on 500 clean and 2,500 noisy CIFAR-10 test images: at full speed as good as frame by frame."""
    from demo.models import load_npz, resnet20
    from export.pictures import Pictures
    from export.pipeline import Options, export_model
    from export.preprocessing import parse_preprocess

    def load(name):
        with lzma.open(data_folder / name) as file:
            raw = np.frombuffer(file.read(), np.uint8).reshape(-1, 3, 32, 32)
        planes = np.cumsum(np.cumsum(raw, 2, np.uint8), 3, np.uint8)
        planes[:, 0] += planes[:, 1]
        planes[:, 2] += planes[:, 1]
        return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))

    calibration = load("cifar10_train5k.u8.xz")[::10]
    test, labels = load("cifar10_test.u8.xz")[:3000], np.load(data_folder / "cifar10_test_labels.npy")[:3000]
    noisy = test[500:] / 255 * (1 + np.random.default_rng(0).normal(0, 0.35, test[500:].shape))  # speckle
    np.savez(tmp_path / "s.npz", images=np.concatenate([test[:500], (np.clip(noisy, 0, 1) * 255).astype(np.uint8)]))
    path = tmp_path / "m.refold"
    network = load_npz(resnet20(), data_folder / "resnet20_cifar10.npz")
    export_model(network, path, parse_preprocess("32x32,imagenet"), Pictures(calibration, None), Options(("ort-x86-avx2",)))

    class Named:
        def __init__(self, path):
            self.path = path

    def accuracy(lines):
        return np.mean([line["class"] == labels[line["frame"]] for line in lines[500:]])

    replayed, status = replay(Named(path), tmp_path / "s.npz", tmp_path / "a", adapt={})
    inline, _ = replay(Named(path), tmp_path / "s.npz", tmp_path / "b", adapt={}, mode="inline")
    frozen, _ = replay(Named(path), tmp_path / "s.npz", tmp_path / "c", adapt={"enabled": False})
    assert replayed == inline and status["looks_dropped"] == 0
    assert accuracy(replayed) > accuracy(frozen) + 0.15


def test_a_look_that_lasts_is_ended_with_the_daemon(bundle, stream, tmp_path, monkeypatch):
    """Whatever waits to be looked at, no thread is left inside the engine when the process ends."""
    monkeypatch.setattr("edge.daemon.ENDING_SECONDS", 0.2)
    run = ImageObserver._measured

    def slowly(self, images, served):
        return run(self, (time.sleep(0.02) or image for image in images for _ in range(200)), served)

    monkeypatch.setattr(ImageObserver, "_measured", slowly)
    values = {
        "bundle": str(bundle.path),
        "data": str(tmp_path / "data"),
        "adapt": {"watch_every": 1, "interval": 1, "probe_frames": 8},
    }
    began = time.monotonic()
    with Daemon(load_settings(None, {**values, "source": {"path": str(stream), "waits": "no"}}, {})) as daemon:
        daemon.run()
    assert isinstance(daemon.building, Worker) and daemon.building.ended and time.monotonic() - began < 30
