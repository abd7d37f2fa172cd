"""Features, shift detector, tap schedule: what a frame says, when a domain has changed, which frames are tapped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_nets import images

from edge.adapt import FEATURES, AdaptSettings, FrameFeatures, KeepSchedule, Reference, ShiftDetector
from edge.adapt.features import image_features
from refold.errors import UsageError

U8 = NDArray[np.uint8]
PROBABILITIES = np.array([0.7, 0.2, 0.1], np.float32)


def noisy(pictures: U8, seed: int = 1) -> U8:
    rng = np.random.default_rng(seed)
    return np.clip(pictures + rng.normal(0, 40, pictures.shape), 0, 255).astype(np.uint8)


def values(pictures: U8) -> NDArray[np.float64]:
    return np.stack([image_features(p) for p in pictures])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.measure(images(200, 32))


def test_features_are_finite_for_flat_and_tiny_pictures() -> None:
    for shape in ((32, 32, 3), (3, 3, 3), (500, 300, 3)):
        assert np.isfinite(image_features(np.full(shape, 255, np.uint8))).all()


def test_only_the_middle_of_a_large_picture_is_looked_at() -> None:
    picture = images(1, 64)[0]
    framed = np.zeros((128, 96, 3), np.uint8)
    framed[32:96, 16:80] = picture
    assert np.array_equal(image_features(framed), image_features(picture))


def test_pixels_are_looked_at_once_and_only_when_asked_for() -> None:
    features = FrameFeatures.of(images(1, 32)[0], PROBABILITIES)
    assert "values" not in vars(features)
    assert features.values is features.values
    assert features.predicted == 0
    assert features.entropy == pytest.approx(-(PROBABILITIES * np.log(PROBABILITIES)).sum(), rel=1e-5)


def test_distance_is_one_within_a_domain_and_large_across(reference: Reference) -> None:
    same = [reference.distance(v, reference.mean) for v in values(images(50, 32, seed=7))]
    assert 0.3 < np.mean(same) < 2.0
    assert reference.distance(values(noisy(images(50, 32, seed=7))).mean(0), reference.mean) > 1.0


def test_a_shift_is_seen_within_a_dozen_frames_and_home_is_quiet(reference: Reference) -> None:
    detector = ShiftDetector(AdaptSettings(), reference)
    for v in values(images(400, 32, seed=3)):
        assert not detector.watch(v)
        detector.learn(v)
    alarms = [bool(detector.watch(v)) for v in values(noisy(images(12, 32, seed=4)))]
    assert any(alarms)


@pytest.mark.parametrize("seed", range(4))
def test_a_faint_shift_is_seen_before_home_has_followed_it(seed: int) -> None:
    """As far away as JPEG artefacts of quality 40 are on CIFAR-10: a fifteenth of the variance between single frames."""
    rng = np.random.default_rng(seed)
    reference = Reference.of(rng.normal(size=(2000, FEATURES)))
    settings = AdaptSettings()
    detector = ShiftDetector(settings, reference)
    for v in rng.normal(size=(1500, FEATURES)):
        assert not detector.watch(v)
        detector.learn(v)
    heard = []
    for v in rng.normal(np.sqrt(0.067), size=(700, FEATURES)):
        heard.append(detector.watch(v))
        detector.learn(v)
    assert max(heard) > settings.probe_frames  # a faster alarm would be taken for chance


def test_frames_that_resemble_each_other_count_for_fewer(reference: Reference) -> None:
    """A camera that shows one picture for a long time is not a shift, though its features are far from the mean."""
    detector = ShiftDetector(AdaptSettings(), reference)
    home = values(images(300, 32, seed=3))
    for v in home[:100]:
        detector.watch(v)
    held = np.repeat(home[100:], 30, axis=0)  # a slide show
    held_alarms = sum(bool(detector.watch(v)) for v in held)
    fresh = ShiftDetector(AdaptSettings(), reference)
    fresh._correlate = lambda values: None  # type: ignore[method-assign]
    assert held_alarms < sum(bool(fresh.watch(v)) for v in held)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 64))
def test_the_schedule_thins_out_and_keeps_its_interval(burst: int, thinning: int, interval: int) -> None:
    schedule = KeepSchedule(AdaptSettings(burst=burst, thinning=thinning, interval=interval))
    taps = [i for i in range(burst + thinning * 2 * interval + 4 * interval) if schedule.due()]
    gaps = np.diff(taps)
    assert taps[: min(burst, len(taps))] == list(range(min(burst, len(taps)))) or interval == 1
    assert (np.diff(gaps) >= 0).all()
    assert gaps.max(initial=1) <= interval
    assert gaps[-1] == interval


def test_a_known_domain_is_spared_the_burst_and_a_settled_one_is_kept_seldom() -> None:
    settings = AdaptSettings()
    schedule = KeepSchedule(settings)
    schedule.restart(known_frames=200.0)
    assert sum(schedule.due() for _ in range(100)) < 30
    schedule.settle()
    assert next(i for i in range(200) if schedule.due()) == settings.interval - 1


@pytest.mark.parametrize(
    "wrong", [{"mix": 1.5}, {"images": 0}, {"burst": 0}, {"evidence_frames": 0.0}, {"domains": 1}, {"shift_threshold": 0.0}]
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        AdaptSettings(**wrong)  # type: ignore[arg-type]


def test_feature_count_is_what_references_hold(reference: Reference) -> None:
    assert reference.mean.shape == (FEATURES,)
    assert reference.precision.shape == (FEATURES, FEATURES)
