"""Other readings of the input: the rule on made-up responses, and all readings of real trained models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from demo.images import load_u8
from export.capture import capture, load_model
from export.diagnose import diagnose
from export.diagnose.reading import Response, doubt_channels, doubt_scaling, leading, mismatch_of, readings, unlikely_reading
from export.pictures import Pictures
from export.preprocessing import parse_preprocess
from export.rounding import prepared
from refold.preprocess import Preprocess

ROOT = Path(__file__).parents[3]


def _response(confident: float, mismatch: float | None, right: float = 0.9, seed: int = 0) -> Response:
    rng = np.random.default_rng(seed)
    labels = np.arange(200) % 5
    logits = rng.normal(0, 0.1, (200, 5)).astype(np.float32)
    named = np.where(np.arange(200) < right * 200, labels, (labels + 1) % 5)
    logits[np.arange(200), named] += confident
    return Response(logits, mismatch)


LABELS = np.arange(200) % 5


def test_mismatch_is_zero_for_what_the_norm_stored_and_one_for_what_it_never_saw():
    mean, variance = np.array([1.0, -2.0]), np.array([4.0, 0.25])
    stored = mean.astype(np.float32), variance.astype(np.float32)
    assert mismatch_of(mean, variance, *stored) == pytest.approx(0, abs=1e-9)
    assert mismatch_of(mean + 1e4, variance, *stored) == pytest.approx(1, abs=1e-6)
    assert 0 < mismatch_of(mean + 0.1, variance * 1.1, *stored) < 0.02
    dead = np.zeros(2, np.float32)
    assert mismatch_of(np.zeros(2), np.zeros(2), dead, dead) == 0, "a dead channel matches"


def test_scalings_are_judged_by_statistics_and_never_against_the_labels():
    stated, other = _response(2, 0.04), _response(2, 0.005)
    assert doubt_scaling(stated, other, None)
    assert not doubt_scaling(_response(2, 0.009), other, None), "both are near"
    assert not doubt_scaling(stated, _response(2, 0.03), None), "not by enough"
    assert not doubt_scaling(stated, _response(2, 0.005, right=0.3), LABELS), "the labels say otherwise"
    assert doubt_scaling(_response(2, 0.02, right=0.3), _response(2, 0.015), LABELS), "the labels decide"
    assert not doubt_scaling(_response(2, 0.015, right=0.3), _response(2, 0.02), LABELS), "the statistics say otherwise"
    assert leading({"unit": other, "pixels": stated}, None) == "unit"


def test_without_statistics_labels_or_information_decide():
    mute, clear = _response(0.05, None), _response(6, None)
    assert doubt_scaling(mute, clear, None) and not doubt_scaling(clear, clear, None)
    wrong = _response(6, None, right=0.2)
    assert doubt_scaling(wrong, clear, LABELS) and not doubt_scaling(clear, wrong, LABELS)
    assert leading({"unit": wrong, "pixels": clear}, LABELS) == "pixels" == leading({"unit": mute, "pixels": clear}, None)


def test_the_channel_order_is_judged_by_confidence_statistics_and_labels():
    assert doubt_channels(_response(2, 0.010), _response(3, 0.008), None)
    assert not doubt_channels(_response(2, 0.008), _response(3, 0.010), None), "the statistics say otherwise"
    assert not doubt_channels(_response(3, 0.010), _response(2, 0.008), None), "the confidence says otherwise"
    assert not doubt_channels(_response(2, 0.010), _response(3, 0.008, right=0.5), LABELS), "the labels say otherwise"
    assert doubt_channels(_response(3, 0.010, right=0.5), _response(2, 0.008), LABELS), "the labels decide"
    assert doubt_channels(_response(1, None), _response(6, None), None)


def test_readings_that_are_the_stated_one_but_for_a_little_are_no_others():
    cifar = Preprocess(32, 32, 1 / 255, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    assert "imagenet" not in readings(cifar) and set(readings(cifar)) >= {"unit", "pixels", "symmetric"}
    for name in (*readings(cifar), "imagenet"):
        assert name not in readings(parse_preprocess(f"32x32,{name}"))


@pytest.fixture(scope="module")
def images(data_folder):
    index = np.linspace(0, 4999, 100).astype(int)
    labels = np.load(data_folder / "cifar10_train5k_labels.npy")[index].astype(np.int64)
    return load_u8(data_folder / "cifar10_train5k.u8.xz")[index], labels


@pytest.fixture(scope="module")
def graphs(data_folder):
    def graph(name, weights):
        model = load_model(f"{ROOT / 'demo/models.py'}:{name}", data_folder / weights)
        return prepared(capture(model, 32, 32))[0]

    return {"pixels": graph("resnet8", "resnet8_mlperftiny_cifar10.npz"), "imagenet": graph("resnet20", "resnet20_cifar10.npz")}


CENTRED = "scale=1,mean=123.675/116.28/103.53"
CASES = [
    *(("pixels", stated, bgr, known) for stated in ("pixels", CENTRED) for bgr in (False, True) for known in (False, True)),
    *(("pixels", stated, stated == "unit", False) for stated in ("unit", "symmetric", "imagenet")),
    ("imagenet", "imagenet", False, False), ("imagenet", "imagenet", True, True), ("imagenet", "symmetric", True, False),
]  # fmt: skip


# ResNet-8 was trained on 0 to 255, ResNet-20 on ImageNet's constants.
@pytest.mark.data
@pytest.mark.parametrize(("trained", "stated", "bgr", "labelled"), CASES)
def test_readings_of_trained_models(trained, stated, bgr, labelled, graphs, images):
    pixels, labels = images
    given = np.ascontiguousarray(pixels[..., ::-1]) if bgr else pixels
    plan = parse_preprocess(f"32x32,{stated}")
    found = list(unlikely_reading(graphs[trained], given, plan, labels if labelled else None))
    assert len(found) == (trained != stated or bgr)
    if found:
        assert (f"--preprocess 32x32,{trained} " in found[0].message) == (trained != stated)
        assert ("BGR" in found[0].message) == bgr and found[0].code == "input-reading"
        assert ("labelled images right" in found[0].message) == labelled


@pytest.mark.data
def test_a_trained_model_rightly_given_has_no_doubt_at_all(graphs, images, data_folder):
    pixels, labels = images
    plan = parse_preprocess("32x32,pixels")
    graph = graphs["pixels"]
    model = load_model(f"{ROOT / 'demo/models.py'}:resnet8", data_folder / "resnet8_mlperftiny_cifar10.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(plan.apply(pixels))).numpy()
    for known in (labels, None):
        assert not list(diagnose(graph, _Table(), Pictures(pixels, known), plan, logits))  # type: ignore[arg-type]
    other = np.array([3, 2, 4, 5, 9, 1, 7, 8, 6, 0])[labels]
    codes = [f.code for f in diagnose(graph, _Table(), Pictures(pixels, other), plan, logits)]  # type: ignore[arg-type]
    assert codes == ["labels", "chance"]


class _Table:
    norms = ()
