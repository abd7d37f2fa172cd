"""Intervals and tails against scipy; chance, labels, amounts and untrained norms on values whose answer is known."""

from __future__ import annotations

import export_nets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from export.diagnose.amount import amount, distinct
from export.diagnose.chance import chance, information, one_answer
from export.diagnose.intervals import at_least, at_most, interval, paired
from export.diagnose.labels import checked, numbering
from export.diagnose.runtimes import differing, images_needed
from export.pictures import Pictures
from refold.errors import InputError

RNG = np.random.default_rng


@given(st.integers(1, 600), st.data())
def test_intervals_are_clopper_pearson(count, data):
    hits = data.draw(st.integers(0, count))
    theirs = stats.binomtest(hits, count).proportion_ci()
    assert interval(hits, count) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.integers(1, 400), st.floats(0, 1), st.data())
def test_tails_are_binomial(count, share, data):
    hits = data.draw(st.integers(0, count))
    assert at_least(hits, count, share) == pytest.approx(stats.binom.sf(hits - 1, count, share), abs=1e-9)
    assert at_most(hits, count, share) == pytest.approx(stats.binom.cdf(hits, count, share), abs=1e-9)


def test_nothing_counted_says_nothing():
    assert interval(0, 0) == (0.0, 1.0) and paired(0, 0) == 1.0
    assert paired(10, 1) == pytest.approx(stats.binomtest(10, 11, 0.5, alternative="greater").pvalue)


def _answers(accuracy: float, count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = RNG(seed)
    labels = rng.integers(0, classes, count)
    right = np.arange(count) < round(accuracy * count)
    return np.where(right, labels, (labels + rng.integers(1, classes, count)) % classes), labels


@pytest.mark.parametrize(
    ("accuracy", "count", "classes", "warns"),
    [
        (0.08, 512, 10, True), (0.12, 512, 10, True), (0.14, 512, 10, True), (0.14, 64, 10, True), (0.0, 64, 10, True),
        (0.35, 512, 10, False), (0.9, 64, 10, False), (0.9, 10, 10, False), (0.7, 300, 1000, False), (0.002, 300, 1000, True),
        (0.5, 200, 2, True), (0.75, 200, 2, False),
    ],
)  # fmt: skip
def test_accuracy_is_compared_with_chance(accuracy, count, classes, warns):
    predicted, labels = _answers(accuracy, count, classes)
    found = list(chance(predicted, labels))
    assert bool(found) == warns
    if warns:
        assert found[0].code == "chance" and f"of {count} of the calibration images" in found[0].message


def test_one_class_for_every_image_is_no_more_than_chance_however_frequent_it_is():
    labels = np.array([0] * 80 + [1] * 20)
    assert list(chance(np.zeros(100, np.int64), labels))
    assert not list(chance(np.zeros(40, np.int64), np.zeros(40, np.int64))), "images of one class: nothing can be told"
    assert not list(chance(np.array([1]), np.array([0]))), "one image tells nothing"


def test_answers_that_ignore_the_image():
    rng = RNG(0)
    flat = rng.normal(0, 0.01, (64, 10)).astype(np.float32)
    assert [f.code for f in one_answer(flat, None)] == ["one-answer"]
    assert not list(one_answer(flat[:8], None)), "too few to tell"
    sure = np.zeros((64, 10), np.float32)
    sure[:, 3] = 9
    assert not list(one_answer(sure, 0.004)), "images of one class, of the kind the norms know"
    assert list(one_answer(sure, 0.4)) and list(one_answer(sure, None))
    sure[np.arange(64), np.arange(64) % 10] = 20
    assert not list(one_answer(sure, None)) and information(sure) == pytest.approx(np.log(10), abs=0.02)


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_that_are_off_by_one(shift):
    predicted, labels = _answers(0.8, 100, 20)
    found = list(numbering(predicted, labels - shift, 20))
    assert [f.code for f in found] == ["labels"] and found[0].numbers["shift"] == shift
    assert ("plus" if shift > 0 else "minus") in found[0].message
    assert not list(numbering(predicted, labels, 20))


def test_labels_in_another_order():
    predicted, labels = _answers(0.9, 200, 5)
    order = np.array([3, 0, 4, 2, 1])
    found = list(numbering(predicted, order[labels], 5))
    assert found[0].numbers["accuracy_renumbered"] >= 0.89 and "--classes" in found[0].message
    assert not list(numbering(*_answers(0.2, 200, 5), 5)), "answers by chance fit no order"
    assert not list(numbering(predicted[:40], order[labels[:40]], 5)), "too few to match classes"


def test_labels_that_cannot_be_class_numbers():
    images = export_nets.pictures(6)
    with pytest.raises(InputError, match="calibration images is 5; the model's classes are 0 to 4"):
        checked(Pictures(images, np.arange(6)), 5, "calibration")
    with pytest.raises(InputError, match="is -1"):
        checked(Pictures(images, np.arange(6) - 1), 5, "validation")
    kept, found = checked(Pictures(images, np.arange(6) % 2, (), ("cat", "dog")), 5, "calibration")
    assert kept.labels is None and "2 class folders" in found[0].message and "5 classes" in found[0].message
    kept, found = checked(Pictures(images, np.arange(6) % 5, (), tuple("abcde")), 5, "calibration")
    assert kept.labels is not None and not found
    assert [f.message for f in checked(Pictures(images, None, (), (), ("why",)), 5, "calibration")[1]] == ["why"]


def test_few_images_are_told_with_a_number():
    images = export_nets.pictures(3)
    found = next(amount(images))
    assert found.code == "too-few-images" and "only 3 different" in found.message and "25%" in found.message
    assert found.numbers["agreement_shown"] == pytest.approx(stats.binomtest(3, 3).proportion_ci().low)
    copies = np.concatenate([images] * 100)
    assert distinct(copies) == 3 and "(of 300; the others are copies)" in next(amount(copies)).message
    assert "is only 1 different calibration image" in next(amount(images[:1])).message
    assert not list(amount(export_nets.pictures(32)))


def test_two_runtimes_that_differ_are_told_with_an_interval():
    found = list(differing("litert", "ort", {"argmax_ort": 62 / 64}, 64, 0.995))
    assert "2 of 64" in found[0].message and "too few images" in found[0].message and found[0].numbers["accepted"] == 0
    taken = list(differing("litert", "ort", {"argmax_ort": 0.9, "difference_accepted": 1.0}, 500, 0.995))
    assert "--accept-difference" in taken[0].message and taken[0].numbers["agreement"] == 0.9
    assert not list(differing("litert", "ort", {"argmax_ort": 1.0}, 64, 0.995))
    assert interval(images_needed(0.995), images_needed(0.995))[0] >= 0.995
