"""The frame path, softmax and predictions: the same answers as the plain engine, and files that are whole."""

from __future__ import annotations

import io
import json
import math
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_nets import images, shifted

from edge.adapt import Adapter, AdaptSettings, Reference
from edge.adaptation import Adaptation
from edge.engine import EngineSlot
from edge.frame_path import Frame, FramePath, Prediction
from edge.outbox import Outbox
from edge.samples import SampleWriter
from edge.select import make_selector
from edge.serving import ServingState
from edge.sinks import JsonLines, json_lines
from edge.softmax import softmax
from edge.worker import Inline, Worker
from refold import Preprocess, Release
from refold.errors import GateError, InputError, StorageError
from refold.statistics import StatisticsModel


@given(st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=100))
def test_softmax_is_the_formula(values):
    logits = np.array(values, np.float32)
    p, index, entropy = softmax(logits)
    exact = np.exp(logits.astype(np.float64) - logits.max())
    exact /= exact.sum()
    np.testing.assert_allclose(p, exact, rtol=1e-4, atol=1e-7)
    assert p.dtype == np.float32 and index == int(logits.argmax())
    h = -float(exact[exact > 0] @ np.log(exact[exact > 0]))
    assert entropy == pytest.approx(h, abs=2e-4)


@pytest.mark.parametrize("classes", [4, 200])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_softmax_of_what_is_not_finite(classes, bad):
    logits = np.zeros(classes, np.float32)
    logits[1] = bad
    with np.errstate(all="ignore"):
        assert math.isnan(softmax(logits)[2])


@given(st.integers(0, 2**32 - 1), st.floats(1 / 300, 1.0), st.integers(1, 40), st.integers(1, 40))
def test_preprocessing_against_float64(seed, scale, width, height):
    rng = np.random.default_rng(seed)
    mean, std = tuple(rng.uniform(-1, 1, 3)), tuple(rng.uniform(0.05, 2, 3))
    p = Preprocess(width, height, scale, mean, std)
    x = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    exact = ((x.astype(np.float64) * scale - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    out = np.empty_like(exact, order="C")
    assert p.apply(x, out) is out
    np.testing.assert_array_equal(out, exact)
    np.testing.assert_array_equal(p.apply(x[1, ::-1, ::-1])[0], exact[1, :, ::-1, ::-1])


@pytest.fixture
def slot(factory):
    return EngineSlot(factory.build(ServingState()))


def adapter(bundle, **settings):
    home = Reference.measure(images(64, 16))
    return Adapter(StatisticsModel.of(bundle), AdaptSettings(**settings), 5, reference=home, bundle_digest=bundle.digest)


def frames(pictures):
    return [Frame(i, picture, f"p{i}", 1000 + i) for i, picture in enumerate(pictures)]


def test_predictions_are_the_engines(bundle, slot):
    path = FramePath(bundle.preprocess, slot)
    pictures = images(20, 16, seed=4)
    answers = [path.step(f) for f in frames(pictures)]
    logits = np.concatenate([slot.current.run(bundle.preprocess.apply(p)) for p in pictures])
    assert [a.predicted for a in answers] == logits.argmax(1).tolist()
    assert path.metrics()["frames"] == 20 and 0 < path.metrics()["latency_p50_ms"] <= path.metrics()["latency_p99_ms"]
    with pytest.raises(InputError):
        path.step(Frame(0, images(1, 8)[0], "small", 0))


def test_every_prediction_names_the_release_that_made_it(bundle, factory, slot):
    path = FramePath(bundle.preprocess, slot)
    (frame,) = frames(images(1, 16))
    assert path.step(frame).release_version == 0
    slot.swap(factory.build(ServingState(shifted(bundle.norms, 1), release_version=7, domain="d3", overlay=True)))
    answer = path.step(frame)
    assert (answer.release_version, answer.domain, answer.overlay) == (7, "d3", True)


def test_kept_frames_reach_the_outbox_with_what_served_them(bundle, slot, tmp_path):
    outbox = Outbox(tmp_path / "outbox.sqlite")
    writer = SampleWriter(bundle, outbox, Inline(), 8)
    path = FramePath(
        bundle.preprocess, slot, selector=make_selector("budget", 5, {"rate": 0.5}), on_sample=writer.add, on_prediction=None
    )
    pictures = images(40, 16, seed=2)
    kept = [a.frame for a in map(path.step, frames(pictures)) if a.kept]
    assert 5 < len(kept) == len(outbox) == writer.stored == path.kept
    header = outbox.headers(1)[0]
    assert header.bundle_digest == bundle.digest and header.preprocess_digest == bundle.preprocess.digest
    assert header.frame in kept and header.taken_unix_ms == 1000 + header.frame and header.release_version == 0
    outbox.close()


def test_a_full_queue_drops_samples_and_counts_them(bundle, slot, tmp_path):
    outbox = Outbox(tmp_path / "outbox.sqlite")
    worker = Worker("idle", 4)  # never started: everything waits
    writer = SampleWriter(bundle, outbox, worker, 3)
    path = FramePath(bundle.preprocess, slot, selector=make_selector("budget", 5, {"rate": 1.0}), on_sample=writer.add)
    for frame in frames(images(20, 16)):
        path.step(frame)
    assert path.frames == 20 and path.kept == 3 and path.samples_dropped == 17
    writer.write()
    assert len(outbox) == 3
    outbox.close()


def test_a_shift_is_followed_inline_and_a_release_taken_in_and_out(bundle, factory, slot):
    reports = []
    adaptation = Adaptation(factory, slot, adapter(bundle), Inline(), reports.append)
    path = FramePath(bundle.preprocess, slot, adaptation=adaptation)
    stream = images(400, 16, seed=8)
    foggy = (stream[200:] * 0.3 + 150).astype(np.uint8)
    for frame in frames(np.concatenate([stream[:200], foggy])):
        answer = path.step(frame)
    assert adaptation.domain != "d0" and answer.overlay and slot.swaps > 0 and reports
    assert adaptation.metrics()["swaps"] == slot.swaps
    np.testing.assert_array_equal(  # what serves is what a fresh engine of the same state says
        slot.current.run(bundle.preprocess.apply(foggy[:4])),
        factory.build(slot.current.serving).run(bundle.preprocess.apply(foggy[:4])),
    )
    release = Release(bundle.digest, "roof", 3, shifted(bundle.norms, 5))
    adaptation.canary(release)
    adaptation.apply(release)
    assert slot.current.serving.release_version == 3
    adaptation.apply(None)
    assert slot.current.serving.release_version == 0
    assert path.step(frame).release_version == 0
    assert Adapter.load(adaptation.dump(), StatisticsModel.of(bundle), AdaptSettings(), 5, bundle_digest=bundle.digest)


def test_what_later_images_do_not_speak_for_is_taken_back_and_said(bundle, factory, slot, monkeypatch, caplog):
    adaptation = Adaptation(factory, slot, adapter(bundle), Inline())
    path = FramePath(bundle.preprocess, slot, adaptation=adaptation)
    stream = images(1200, 16, seed=8)
    stream[200:] = (stream[200:] * 0.3 + 150).astype(np.uint8)
    for frame in frames(stream[:400]):
        answer = path.step(frame)
    assert answer.overlay and adaptation.metrics()["states_taken_back"] == 0
    monkeypatch.setattr("edge.adapt.proposal.supported", lambda shift, change: False)
    with caplog.at_level("INFO"):
        for frame in frames(stream[400:]):
            answer = path.step(frame)
    assert not answer.overlay and answer.domain == adaptation.domain != "d0"
    assert adaptation.metrics()["states_taken_back"] == 1 and adaptation.metrics()["adapt_overlays_unsupported"] > 0
    assert "taken back" in caplog.text
    np.testing.assert_array_equal(
        slot.current.run(bundle.preprocess.apply(stream[-4:])),
        factory.build(slot.current.serving).run(bundle.preprocess.apply(stream[-4:])),
    )


def test_a_release_that_makes_no_sense_is_refused_and_the_old_engine_serves(bundle, factory, slot):
    adaptation = Adaptation(factory, slot, adapter(bundle), Inline())
    before = slot.current
    dead = {
        s.name: type(s.exported)(s.exported.gamma, s.exported.beta - 1e3, s.exported.mean, s.exported.variance)
        for s in bundle.norms.norms
    }
    with pytest.raises(GateError):
        adaptation.canary(Release(bundle.digest, "roof", 1, dead))
    assert slot.current is before


def test_workers_run_in_order_refuse_when_full_and_survive_errors(caplog):
    done = []
    worker = Worker("test", 3)
    assert [worker.offer(lambda i=i: done.append(i)) for i in range(5)] == [True] * 3 + [False] * 2
    worker.every(0.01, lambda: done.append("tick"))
    worker.start()
    worker.offer(lambda: (_ for _ in ()).throw(StorageError("the disk is full")))
    for _ in range(1000):
        if "tick" not in done:
            time.sleep(0.01)
    worker.close()
    assert [d for d in done if d != "tick"] == [0, 1, 2] and "tick" in done
    assert worker.last_error == "the disk is full" and not worker.offer(done.clear)


def test_a_failure_is_said_once_and_forgotten_when_it_is_over(caplog):
    runner, full = Inline(), [True]

    def store():
        if full:
            raise StorageError("the disk is full")

    for _ in range(5):
        runner.offer(store)
        runner.offer(list)
    assert caplog.text.count("the disk is full") == 1 and runner.last_error == "the disk is full"
    full.clear()
    runner.offer(store)
    assert runner.last_error == ""
    with pytest.raises(ZeroDivisionError):
        runner.offer(lambda: 1 / 0)


PREDICTION = Prediction(3, 17, 'odd "name"\n', 1, 0.5, 0.69, 4, "d1", True, False, 0.4)


def test_lines_are_json_with_everything_in_them(tmp_path):
    sink = JsonLines(str(tmp_path / "sub" / "p.jsonl"), ["cat", 'do"g'])
    sink.add(PREDICTION)
    sink.add(PREDICTION._replace(entropy=math.nan, probability=math.nan, predicted=9, overlay=False, kept=True))
    sink.close()
    first, second = map(json.loads, (tmp_path / "sub" / "p.jsonl").read_text().splitlines())
    assert first == {
        "frame": 3, "unix_ms": 17, "source": 'odd "name"\n', "class": 1, "label": 'do"g', "probability": 0.5, "entropy": 0.69,
        "release_version": 4, "domain": "d1", "overlay": True, "kept": False, "latency_ms": 0.4,
    }  # fmt: skip
    assert "label" not in second and second["kept"] and second["entropy"] == -1


def test_lines_on_standard_output(monkeypatch):
    class Out:
        buffer = io.BytesIO()

    monkeypatch.setattr(sys, "stdout", Out)
    sink = JsonLines("-")
    sink.add(PREDICTION)
    sink.close()
    assert json.loads(Out.buffer.getvalue())["frame"] == 3


def test_a_full_disk_costs_no_line_and_no_half_line(tmp_path, monkeypatch):
    sink = JsonLines(str(tmp_path / "p.jsonl"))

    class Full:
        """Takes so many bytes, then is full."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            n = min(self.room, len(data))
            self.room -= n
            return self.file.write(data[:n])

        def __getattr__(self, name):
            return getattr(self.file, name)

    sink._file = Full(sink._file, 150)
    for i in range(10):
        sink.add(PREDICTION._replace(frame=i))
    with pytest.raises(StorageError, match="No space left"):
        sink.flush()
    sink.add(PREDICTION._replace(frame=10))
    sink._file.room = 10**6
    sink.close()
    assert [json.loads(x)["frame"] for x in (tmp_path / "p.jsonl").read_text().splitlines()] == list(range(11))
    monkeypatch.setattr(json_lines, "WAITING", 4)
    small = JsonLines(str(tmp_path / "q.jsonl"))
    for _ in range(6):
        small.add(PREDICTION)
    assert small.dropped == 2
    small.close()
    with pytest.raises(StorageError, match="cannot be written"):
        JsonLines(str(tmp_path / "p.jsonl" / "below"))


def test_a_file_at_its_limit_is_set_aside(tmp_path):
    sink = JsonLines(str(tmp_path / "p.jsonl"), limit_bytes=500)
    for i in range(10):
        sink.add(PREDICTION._replace(frame=i))
        sink.flush()
    sink.close()
    kept = [(tmp_path / name).read_text().splitlines() for name in ("p.jsonl.1", "p.jsonl")]
    assert json.loads(kept[1][-1])["frame"] == 9 and all(len("\n".join(k)) < 900 for k in kept)
