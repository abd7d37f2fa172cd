"""Corrections, second looks and novelty marks in the frame path and the daemon, on a real bundle and its engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from daemon_process import DaemonProcess
from small_nets import images

from edge.adapt import AdaptSettings
from edge.adaptation.corrections import RequestCorrector, SecondLook, make_corrector
from edge.adaptation.novelty import NOVEL_SCORE, NoveltyGate, NoveltySettings
from edge.daemon import Daemon
from edge.engine import EngineSlot
from edge.frame_path import Frame, FramePath
from edge.inference import Handlers
from edge.inference.handlers import InferenceRequest, Tensor
from edge.outbox import Outbox
from edge.samples import SampleWriter
from edge.select import make_selector
from edge.serving import ServingState
from edge.settings import EdgeSettings, load_settings
from edge.softmax import softmax
from edge.worker import Inline
from refold import write_bundle
from refold.errors import UsageError
from refold.v1 import manifest_pb2 as pb


@pytest.fixture
def slot(factory):
    return EngineSlot(factory.build(ServingState()))


def frames(pictures):
    return [Frame(i, picture, f"p{i}", 1000 + i) for i, picture in enumerate(pictures)]


@pytest.fixture(scope="module")
def sorted_pictures(bundle, factory):
    """Frames in the order of the classes that the engine says: the longest runs there can be."""
    pictures = images(600, 16, seed=11)
    classes = factory.build(ServingState()).run_pictures(pictures).argmax(1)
    return pictures[np.argsort(classes, kind="stable")]


@pytest.mark.parametrize("name", ["lame", "t3a", "adanpc"])
def test_runs_are_corrected_and_a_shuffled_stream_is_left_alone(bundle, slot, sorted_pictures, name):
    logits = slot.current.run_pictures(sorted_pictures)
    expected = make_corrector(name, 5)
    path = FramePath(bundle.preprocess, slot, corrector=make_corrector(name, 5))
    for frame, row in zip(frames(sorted_pictures), logits, strict=True):
        answer, wanted = path.step(frame), expected.answer(row, "")
        p = softmax(row)[0] if wanted is None else wanted
        assert answer.corrected == (wanted is not None)
        assert answer.predicted == p.argmax() and answer.probability == pytest.approx(float(p.max()))
    assert path.metrics()["corrected_frames"] > 50 and path.metrics()["correction_switches"] >= 1

    mixed = sorted_pictures[np.random.default_rng(0).permutation(600)]
    path, plain = FramePath(bundle.preprocess, slot, corrector=make_corrector(name, 5)), FramePath(bundle.preprocess, slot)
    for frame in frames(mixed):
        one, other = path.step(frame), plain.step(frame)
        assert one._replace(latency_ms=0) == other._replace(latency_ms=0)
    assert path.metrics()["corrected_frames"] == 0


class Judged:
    """A selector that remembers what it was given."""

    def __init__(self):
        self.given = []
        self._inner = make_selector("budget", 5)

    def judge(self, probs, entropy=None):
        self.given.append(probs)
        return self._inner.judge(probs, entropy)


@pytest.mark.parametrize(("name", "sees"), [("lame", True), ("t3a", False), ("adanpc", False)])
def test_the_selector_sees_corrected_probabilities_only_where_they_are_calibrated(bundle, slot, sorted_pictures, name, sees):
    selector = Judged()
    path = FramePath(bundle.preprocess, slot, selector=selector, corrector=make_corrector(name, 5))
    answers = [path.step(f) for f in frames(sorted_pictures)]
    own = [softmax(row)[0] for row in slot.current.run_pictures(sorted_pictures)]
    same = [np.array_equal(a, b) for a, b in zip(selector.given, own, strict=True)]
    assert any(a.corrected for a in answers)
    assert all(s for s, a in zip(same, answers, strict=True) if not a.corrected)
    assert all(same) if not sees else not all(same)


def test_a_second_look_is_the_mean_with_the_mirrored_image(bundle, slot):
    pictures = images(300, 16, seed=3)
    path = FramePath(bundle.preprocess, slot, second_look=SecondLook(5))
    plain = slot.current.run_pictures(pictures)
    mirrored = slot.current.run_pictures(np.ascontiguousarray(pictures[:, :, ::-1]))
    expected = SecondLook(5)
    for frame, one, two in zip(frames(pictures), plain, mirrored, strict=True):
        answer = path.step(frame)
        p, _, entropy = softmax(one)
        if expected.wants(entropy):
            p = (p + softmax(two)[0]) / 2
        assert answer.probability == pytest.approx(float(p.max()), abs=1e-5)
    metrics = path.metrics()
    assert metrics["second_looks"] == expected.looks > 20 and 1.05 < metrics["compute_ratio"] <= 1.2


def test_novel_frames_are_kept_first(bundle, slot):
    calibration = images(64, 16)
    gate = NoveltyGate(calibration, slot.current.run_pictures(calibration), "", NoveltySettings(every=1))
    kept = []

    def keep(frame, verdict, prediction):
        kept.append((frame.number, verdict))
        return True

    path = FramePath(bundle.preprocess, slot, selector=make_selector("budget", 5), novelty=gate, on_sample=keep)
    answers = [path.step(f) for f in frames(np.concatenate([images(100, 16, seed=1), 255 - images(20, 16, seed=2) // 8]))]
    assert sum(a.novel for a in answers[:100]) < 12 and sum(a.novel for a in answers[100:]) > 15
    marked = {n: v for n, v in kept if v.reason == "novel"}
    assert len(marked) < len(kept) and marked and all(v.score == NOVEL_SCORE and not v.unbiased for v in marked.values())
    assert max(marked) >= 100 and all(answers[n].novel for n in marked)


def test_the_outbox_offers_novel_frames_first(bundle, slot, tmp_path):
    calibration = images(64, 16)
    gate = NoveltyGate(calibration, slot.current.run_pictures(calibration), "", NoveltySettings(every=1))
    outbox = Outbox(tmp_path / "outbox.sqlite")
    writer = SampleWriter(bundle, outbox, Inline(), 8)
    path = FramePath(bundle.preprocess, slot, selector=make_selector("budget", 5), novelty=gate, on_sample=writer.add)
    stream = np.concatenate([images(100, 16, seed=1), 255 - images(20, 16, seed=2) // 8])
    novel = [a.frame for a in map(path.step, frames(stream)) if a.novel and a.kept]
    headers = outbox.headers(len(outbox))
    first = [h for h in headers if h.score == NOVEL_SCORE]
    assert 0 < len(first) < len(headers) and headers[: len(first)] == first
    assert {h.frame for h in first} <= set(novel) and not any(h.unbiased for h in first)
    outbox.close()


def without(bundle, path, *, taps, calibration):
    """The same bundle without its tap model or its calibration slice."""
    manifest = pb.Manifest()
    manifest.CopyFrom(bundle.manifest)
    target, lost = manifest.targets[0], []
    if not taps:
        lost.append(target.taps)
        target.taps = ""
    if not calibration:
        lost.append(manifest.calibration)
        manifest.calibration = ""
    kept = [p for p in (target.model, target.taps, manifest.student, manifest.calibration) if p]
    return write_bundle(path, manifest, {p: bundle.read(p) for p in kept})


def daemon(bundle, folder, **adapt):
    settings = EdgeSettings(bundle=str(bundle.path), data=str(folder / "data"), mode="inline", adapt=AdaptSettings(**adapt))
    return Daemon(settings)


def test_without_a_tap_model_nothing_is_corrected(bundle, tmp_path, caplog):
    bare = without(bundle, tmp_path / "bare.refold", taps=False, calibration=True)
    with daemon(bare, tmp_path, correction="lame") as one:
        assert "correction_on" not in one.path.metrics()
    assert "adapt.correction is off" in caplog.text and "nothing notices a shift" in caplog.text


def test_without_calibration_images_nothing_is_novel(bundle, tmp_path, caplog):
    bare = without(bundle, tmp_path / "bare.refold", taps=True, calibration=False)
    with daemon(bare, tmp_path, novelty=True, correction="adanpc") as one:
        assert one.path.novelty is None and one.path.metrics()["correction_on"] == 0.0
    assert "adapt.novelty is off" in caplog.text


def test_adanpc_of_a_daemon_begins_with_the_calibration_slice(bundle, tmp_path):
    with daemon(bundle, tmp_path, correction="adanpc") as one:
        assert one.path._corrector is not None and one.path._corrector.correction._begun > 5


def test_a_request_in_floats_is_not_corrected(bundle, slot, sorted_pictures):
    handlers = Handlers(bundle, slot, max_batch=64, corrector=RequestCorrector(make_corrector("lame", 5), lambda: "d0"))
    for batch in np.split(bundle.preprocess.apply(sorted_pictures), 10):
        asked = InferenceRequest(handlers.name, "", "", (Tensor(handlers.input_name, "FP32", batch),))
        assert handlers.infer(asked).corrected == 0


def test_requests_are_answered_with_what_corrects_them(bundle, slot, sorted_pictures):
    seen = []
    requests = RequestCorrector(make_corrector("lame", 5), lambda: "d0")
    handlers = Handlers(bundle, slot, max_batch=8, observe=lambda *a: seen.append(a), corrector=requests)
    expected = make_corrector("lame", 5)
    corrected = 0
    for batch in np.split(sorted_pictures, 75):
        asked = InferenceRequest(handlers.name, "", "", (Tensor(handlers.input_name, "UINT8", batch),))
        result = handlers.infer(asked)
        own = slot.current.run_pictures(batch)
        for row, answer in zip(own, result.logits, strict=True):
            wanted = expected.answer(row, "d0")
            if wanted is None:
                np.testing.assert_array_equal(answer, row)
            else:
                np.testing.assert_allclose(softmax(answer)[0], wanted, atol=1e-5)
        corrected += result.corrected
    assert corrected > 50 and len(seen) == 600 and sum(a[5] is not None for a in seen) == corrected


def test_the_daemon_corrects_and_counts(bundle, sorted_pictures, tmp_path):
    np.savez(tmp_path / "stream.npz", images=sorted_pictures)
    arguments = ("--bundle", bundle.path, "--source", tmp_path / "stream.npz", "--json", "--selector", "budget")
    more = ("--set", "adapt.correction=auto", "--set", "adapt.second_look=true", "--set", "adapt.novelty=true")
    with DaemonProcess(*arguments, *more, data=tmp_path / "data") as daemon:
        assert daemon.wait() == 0, daemon.said()
        metrics = json.loads(daemon.output)["metrics"]
    lines = daemon.lines()
    assert metrics["corrected_frames"] == sum(x.get("corrected", False) for x in lines)
    assert metrics["novel_frames"] == sum(x.get("novel", False) for x in lines)
    assert 1.0 < metrics["compute_ratio"] <= 1.2 and metrics["second_looks"] > 0
    assert "Traceback" not in daemon.said()


def test_a_correction_without_the_shift_detector_is_refused():
    with pytest.raises(UsageError, match=r"adapt\.correction is 'auto' and adapt\.enabled is false"):
        load_settings(assignments=["adapt.correction=auto", "adapt.enabled=false"], environment={})
    assert load_settings(assignments=["adapt.enabled=false"], environment={}).adapt.correction == "off"
