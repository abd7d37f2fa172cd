"""The gate: the pure verdict, and real candidates through the real engine."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fleet_of import population, shifted
from hypothesis import given
from hypothesis import strategies as st
from school_of_tests import SeesThroughMist
from small_nets import images

from cloud.gate import Gate
from cloud.gating.comparison import Comparison, Scores, histogram_entropy, paired, tempered
from cloud.gating.kept import Kept, keep
from cloud.gating.verdict import Finding, GateResult, clean_fault, verdict
from cloud.settings import GateSettings
from edge.adapt import Adapter, AdaptSettings, FrameFeatures, ImageObserver, Reference
from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import measure_of
from refold.bundle import Bundle, write_bundle
from refold.norms import NormState
from refold.release import Release
from refold.statistics import StatisticsModel

WIDE = GateSettings(shifted_clean_points=100)
SETTINGS = GateSettings(held_back=32)
PASS, REFUSE, WAIT = Finding.PASS, Finding.REFUSE, Finding.WAIT


def scores(expected: np.ndarray, cross_entropy: np.ndarray, agreement: float = 0.5, class_entropy: float = 1.5) -> Scores:
    return Scores(agreement, class_entropy, expected, cross_entropy)


def pair(count: int, better: int, worse: int, gain: float, seed: int = 0) -> tuple[Scores, Scores]:
    """(new, old) on `count` images: so many answers the teacher likes better or worse, and a mean fall of cross-entropy."""
    rng = np.random.default_rng(seed)
    old, new = np.full(count, 0.5), np.full(count, 0.5)
    new[:better], new[count - worse :] = 1.0, 0.0
    noise = rng.normal(0, 0.2, count)
    before = rng.uniform(0.5, 2.0, count)
    return scores(new, before - gain - (noise - noise.mean())), scores(old, before)


@pytest.mark.parametrize(
    ("count", "better", "worse", "gain", "finding"),
    [
        (64, 4, 1, 0.10, PASS),  # the cross-entropy falls by four standard errors
        (64, 1, 1, 0.01, PASS),  # a little better, and 64 images rule out a loss of four points
        (64, 2, 10, 0.01, REFUSE),  # the teacher likes the new answers less, by more than chance
        (64, 2, 2, -0.10, REFUSE),  # the cross-entropy rises by more than chance
        (64, 3, 6, 0.01, WAIT),  # a little better, but four points of loss are not ruled out
        (40, 3, 4, -0.01, WAIT),  # nothing to be seen on so few
        (400, 3, 4, -0.001, WAIT),  # nor on many: the number of judgements ends it
        (64, 6, 1, 0.0, PASS),  # the teacher likes the new answers more, by more than chance, and the other is no worse
        (64, 2, 1, -0.001, PASS),  # the same, within chance, but a loss of four points is ruled out
        (64, 6, 1, -0.03, WAIT),
        (22, 0, 0, 0.10, WAIT),  # the kind: 54.5 % to 54.5 % on 22
        (22, 2, 1, 0.01, WAIT),
        (22, 0, 9, -0.5, REFUSE),  # harm shows on few
    ],
)
def test_verdict(count: int, better: int, worse: int, gain: float, finding: Finding) -> None:
    result = verdict(*pair(count, better, worse, gain), 1.6, SETTINGS)
    assert result.finding is finding, result.reasons
    assert f"on {count} held out" in result.reasons[0] and "could be shown" in result.reasons[0]
    assert result.metrics["smallest_effect"] > 0 and result.metrics["held_back_wanted"] >= 1


def test_an_undecided_verdict_says_how_many_samples_would_do() -> None:
    result = verdict(*pair(40, 3, 4, -0.01), 1.6, SETTINGS)
    wanted = int(result.metrics["held_back_wanted"])
    assert f"about {wanted} held-out samples would rule out a loss of 4 points" in result.reasons[0] and wanted > 40
    assert f"{100 * result.metrics['smallest_effect']:.1f} could be shown" in result.reasons[0]


@given(st.integers(1, 600), st.integers(0, 300), st.integers(0, 300), st.floats(-2, 2))
def test_no_verdict_passes_on_less_than_the_fewest_or_without_a_gain(count: int, better: int, worse: int, gain: float) -> None:
    new, old = pair(count, min(better, count), min(worse, count - min(better, count)), gain)
    result = verdict(new, old, 1.6, SETTINGS)
    if result.passed:
        assert count >= SETTINGS.held_back and (gain > 0 or result.metrics["expected_rise"] > 0)
        assert result.metrics["cross_entropy_errors"] > -0.25
    same = verdict(old, old, 1.6, SETTINGS)
    assert not same.passed


def test_a_wanted_rise_must_be_reached() -> None:
    new, old = pair(64, 10, 0, 0.2)
    settings = replace_settings(agreement_points=5)
    assert verdict(replace(new, agreement=0.56), old, 1.6, settings).passed
    assert verdict(replace(new, agreement=0.54), old, 1.6, settings).finding is REFUSE


def replace_settings(**values: float) -> GateSettings:
    return GateSettings(**{**SETTINGS.model_dump(), **values})


def test_collapse_is_refused_but_not_where_there_were_fewer_classes_before() -> None:
    new, old = pair(64, 10, 0, 0.2)
    assert "collapse" in verdict(replace(new, class_entropy=1.0), old, 1.6, SETTINGS).reasons[0]
    assert verdict(replace(new, class_entropy=0.5), replace(old, class_entropy=0.2), 1.6, SETTINGS).passed


def test_scores_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.3], [0.2, 0.8]], np.float32))
    teacher = np.array([[0.9, 0.1], [0.6, 0.4]], np.float32)
    found = Scores.of(logits, teacher)
    assert found.agreement == 0.5 and found.expected == pytest.approx([0.9, 0.4], rel=1e-6)
    assert found.class_entropy == pytest.approx(np.log(2)) == histogram_entropy(np.array([0, 1]), 2)
    assert np.isfinite(Scores.of(np.array([[200.0, -200.0]], np.float32), np.array([[0, 1]], np.float32)).cross_entropy).all()


def test_becoming_less_sure_is_no_gain() -> None:
    rng = np.random.default_rng(4)
    teacher = rng.dirichlet(np.full(5, 0.4), 64).astype(np.float32)
    logits = (np.log(teacher + 0.02) * 3 + rng.normal(0, 1, teacher.shape)).astype(np.float32)
    assert np.allclose(tempered(logits, teacher), tempered(logits * np.float32(0.5), teacher), atol=0.01)
    assert not verdict(Scores.of(logits * np.float32(0.5), teacher), Scores.of(logits, teacher), 1.6, SETTINGS).passed


def test_what_so_many_images_can_show() -> None:
    found = paired(np.repeat([1.0, 0.0, 0.0, 0.0], 25), np.repeat([0.0, 0.0, 0.0, 1.0], 25))
    assert found.rise == 0 and found.error == pytest.approx(np.sqrt(0.5 / 99), rel=1e-2)
    assert found.images_for(0.01, 1.0) == pytest.approx(5050, abs=60)
    assert Comparison(50, 0.02, 0.01).images_for(0.02, 1.0) == 13
    with pytest.raises(ValueError):
        paired(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError):
        paired(np.array([np.nan]), np.zeros(1))
    assert paired(np.zeros(10), np.zeros(10)).error == 0.1  # nothing moved: one image is what could have


@pytest.mark.parametrize(
    ("lost", "gained", "strict", "fault"),
    [(0, 5, False, False), (9, 5, False, False), (40, 5, False, True), (8, 0, True, True), (8, 0, False, False)],
)
def test_clean_faults(lost: int, gained: int, strict: bool, fault: bool) -> None:
    old = np.arange(400) < 300
    new = old.copy()
    new[:lost] = False
    new[400 - gained :] = True
    assert bool(clean_fault(new, old, 1.5 if strict else 2.0, "clean accuracy", strict=strict)) is fault


# Undecided candidates -------------------------------------------------------------------------------------------------------

UNDECIDED = GateResult(WAIT, ("undecided: too few",))


def test_an_undecided_candidate_is_kept_and_judged_again_and_refused_in_the_end() -> None:
    kept: Kept | None = None
    counts = []
    result, held = UNDECIDED, 30
    while True:
        result, kept = keep("candidate", UNDECIDED, held, kept, SETTINGS)  # type: ignore[arg-type]
        counts.append(held)
        if kept is None:
            break
        assert not kept.due(kept.wanted - 1) and kept.due(kept.wanted) and kept.candidate == "candidate"
        held = kept.wanted
    assert counts == [30, 38, 48, 60] and result.finding is REFUSE
    assert "after 4 judgements" in result.reasons[0] and "too few" in result.reasons[0]


@given(st.integers(0, 600), st.integers(1, 6), st.floats(1.01, 4))
def test_keeping_is_bounded(held: int, judgements: int, growth: float) -> None:
    settings = replace_settings(judgements=judgements, more_evidence=growth)
    kept, times = None, 0
    while True:
        result, kept = keep("c", UNDECIDED, held, kept, settings)  # type: ignore[arg-type]
        times += 1
        if kept is None:
            break
        assert kept.wanted > held
        held = kept.wanted
    assert result.finding is REFUSE and times <= judgements


# The engine -----------------------------------------------------------------------------------------------------------------


def candidate(states: dict[str, NormState], domain: str = "d1") -> Any:
    return SimpleNamespace(states=states, activations=(), domain=domain, samples=1, statistics_frames=1, metrics={})


@pytest.fixture(scope="module")
def mist(small: Bundle) -> tuple[Any, Any]:
    """(held-out images in the mist, what a teacher who sees through it thinks of them)."""
    held_back = shifted(images(64, 16, 7))
    return held_back, SeesThroughMist(small).probabilities(held_back, "d1")


@pytest.fixture(scope="module")
def good(small: Bundle) -> dict[str, NormState]:
    """States that see through the mist better than a device's own overlay does."""
    return population(small, shifted(images(64, 16, 8)))[0]


def test_the_populations_statistics_pass(small: Bundle, mist: tuple[Any, Any], good: Any) -> None:
    result = Gate(small, WIDE).judge(candidate(good), None, *mist)
    assert result.passed, result.reasons
    assert result.metrics["agreement"] > result.metrics["agreement_before"] and result.metrics["held_back"] == 64
    assert result.reasons[0].startswith("agreement ") and "clean " in result.reasons[0]


def test_what_is_served_already_is_not_released_again(small: Bundle, mist: tuple[Any, Any], good: Any) -> None:
    served = Release(small.digest, "roof", 1, good, domain="d1")
    result = Gate(small, WIDE).judge(candidate(good), served, *mist)
    assert not result.passed and result.metrics["expected_rise"] == 0


def test_a_candidate_must_beat_what_devices_do_alone(small: Bundle, mist: tuple[Any, Any], good: Any) -> None:
    gate, some = Gate(small, WIDE), shifted(images(64, 16, 9))
    exported = gate.judge(candidate(good), None, *mist, some[:0])
    overlaid = gate.judge(candidate(good), None, *mist, some)
    assert overlaid.metrics["cross_entropy_before"] < exported.metrics["cross_entropy_before"]
    assert overlaid.metrics["clean_accuracy_before"] < exported.metrics["clean_accuracy_before"]
    assert gate.judge(candidate({}), None, *mist, some).finding is REFUSE


def test_what_devices_do_alone_is_measured_as_they_measure_it(small: Bundle, mist: tuple[Any, Any]) -> None:
    """The adapter itself, on the same images: both end at the same overlay."""
    some = shifted(images(64, 16, 9))
    gate = Gate(small, WIDE)
    served = gate._alone(None, "d1", some)
    habits = AdaptSettings(first_images=64, shift_threshold=1e-3, shift_floor=1e-9)
    model, factory = StatisticsModel.of(small), EngineFactory(small)
    adapter = Adapter(model, habits, 5, reference=Reference.measure(images(64, 16, 1)))
    measure = measure_of(factory, model, 64)
    assert measure is not None
    observer = ImageObserver(adapter, measure, model)
    adapter._begin(FrameFeatures.of(some[0], np.full(5, 0.2)).values)
    adapter._provisional = False
    state = None
    for i, image in enumerate(some):
        state = observer.observe(i, image, state or ServingState(domain="d0")) or state
    assert state is not None and state.overlay
    for name, own in served.states.items():
        assert np.allclose(own.mean, state.states[name].mean, atol=0.03), name
        assert np.allclose(own.variance, state.states[name].variance, rtol=0.1), name


def test_a_state_outside_the_trust_region_is_refused(small: Bundle, mist: tuple[Any, Any]) -> None:
    site = small.norms.norms[0]
    wild = NormState(-site.exported.gamma, site.exported.beta, site.exported.mean, site.exported.variance)
    result = Gate(small, WIDE).judge(candidate({site.name: wild}), None, *mist)
    assert not result.passed and result.reasons[0].startswith("not admissible")


def test_clean_accuracy_may_not_fall(small: Bundle, mist: tuple[Any, Any]) -> None:
    last = small.norms.norms[-1]
    state = last.exported
    ruined = NormState(
        state.gamma, state.beta + np.linspace(-4, 4, len(state.beta), dtype=np.float32), state.mean, state.variance
    )
    gate = Gate(small, GateSettings(shifted_clean_points=3))
    for domain, allowed in (("d0", "0.5 are allowed"), ("", "0.5 are allowed"), ("d1", "3 are allowed")):
        result = gate.judge(candidate({last.name: ruined}, domain), None, *mist)
        assert result.finding is REFUSE and "clean accuracy falls" in result.reasons[0] and allowed in result.reasons[0]


def test_a_home_release_is_held_against_the_export_and_not_against_the_last_release(
    small: Bundle, mist: tuple[Any, Any]
) -> None:
    last = small.norms.norms[-1]
    state = last.exported
    ruined = NormState(
        state.gamma, state.beta + np.linspace(-4, 4, len(state.beta), dtype=np.float32), state.mean, state.variance
    )
    served = Release(small.digest, "roof", 3, {last.name: ruined}, domain="d0")
    result = Gate(small, GateSettings()).judge(candidate({last.name: ruined}, "d0"), served, *mist)
    assert "clean accuracy falls" in result.reasons[0]


@pytest.mark.parametrize("domain", ["d0", ""])
def test_a_release_for_home_that_changes_hardly_anything_loses_nothing_there(
    small: Bundle, mist: tuple[Any, Any], domain: str
) -> None:
    states = {
        n.name: NormState(n.exported.gamma * np.float32(1.001), n.exported.beta, n.exported.mean, n.exported.variance)
        for n in small.norms.norms
    }
    result = Gate(small, GateSettings()).judge(candidate(states, domain), None, *mist)
    assert result.metrics["clean_accuracy"] > result.metrics["clean_accuracy_before"] - 0.005
    assert "clean accuracy" not in result.reasons[0]


def test_a_shifted_domains_statistics_do_not_count_as_a_clean_loss(small: Bundle, mist: tuple[Any, Any], good: Any) -> None:
    """Its statistics go further than a device's own; its gamma and beta are the exported ones."""
    result = Gate(small, GateSettings()).judge(candidate(good), None, *mist)
    assert result.passed and result.metrics["clean_accuracy"] == 1.0


# Missing evidence never speaks for a candidate ------------------------------------------------------------------------------

CONSTANT = np.tile(np.array([[0.6, 0.1, 0.1, 0.1, 0.1]], np.float32), (64, 1))


@pytest.mark.parametrize(
    ("change", "finding", "what"),
    [
        ({"held_back": np.zeros((0, 16, 16, 3), np.uint8), "teacher": None}, WAIT, "0 held-out samples could be read"),
        ({"teacher": None}, REFUSE, "no teacher"),
        ({"held_back": 10, "teacher": 10}, WAIT, "10 held-out samples could be read, 32 are the fewest"),
        ({"teacher": np.full((64, 5), np.nan, np.float32)}, REFUSE, "no probabilities"),
        ({"teacher": np.full((64, 1000), 0.001, np.float32)}, REFUSE, "1,000 classes"),
        ({"teacher": np.zeros((64, 5), np.float32)}, REFUSE, "no probabilities"),
        ({"teacher": CONSTANT}, REFUSE, "the same whatever it is shown"),
        ({"teacher": np.full((64, 5), 0.2, np.float32)}, REFUSE, "the same whatever it is shown"),
    ],
)
def test_missing_evidence(
    small: Bundle, mist: tuple[Any, Any], good: Any, change: dict[str, Any], finding: Finding, what: str
) -> None:
    given: dict[str, Any] = {"held_back": mist[0], "teacher": mist[1]}
    for name, value in change.items():
        given[name] = given[name][:value] if isinstance(value, int) else value
    result = Gate(small, WIDE).judge(candidate(good), None, **given)
    assert result.finding is finding and what in result.reasons[0], result.reasons


def test_a_bundle_without_calibration_images_releases_nothing(
    small: Bundle, mist: tuple[Any, Any], good: Any, tmp_path: Path
) -> None:
    for name, parts in (("without", None), ("empty", np.zeros((0, 16, 16, 3), np.uint8))):
        bare = without_calibration(small, tmp_path / f"{name}.refold", parts)
        result = Gate(bare, WIDE).judge(candidate(good), None, *mist)
        assert result.finding is REFUSE and "no calibration images" in result.reasons[0]


def without_calibration(bundle: Bundle, path: Path, pictures: np.ndarray | None) -> Bundle:
    manifest = type(bundle.manifest)()
    manifest.CopyFrom(bundle.manifest)
    manifest.ClearField("parts")
    manifest.calibration = "" if pictures is None else "calibration.npz"
    names = ["model.onnx", "taps.onnx", "student.pt2"]
    parts = {name: bundle.read(name) for name in names}
    if pictures is not None:
        out = io.BytesIO()
        np.savez(out, images=pictures)
        parts["calibration.npz"] = out.getvalue()
    return write_bundle(path, manifest, parts)
