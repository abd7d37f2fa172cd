"""The gate: the pure verdict, and real candidates through the real engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fleet_of import population, shifted
from school_of_tests import SeesThroughMist
from small_nets import images

from cloud.gate import Gate, Scores, histogram_entropy, verdict
from cloud.settings import GateSettings
from refold.bundle import Bundle
from refold.norms import NormState
from refold.release import Release

WIDE = GateSettings(shifted_clean_points=100)
GOOD = Scores(0.5, 1.0, 1.5)


@pytest.mark.parametrize(
    ("new", "fault"),
    [
        (Scores(0.6, 1.2, 1.5), ""),
        (Scores(0.5, 0.9, 1.5), ""),
        (Scores(0.5, 1.0, 1.5), "does not rise"),
        (Scores(0.5, 1.1, 1.5), "does not rise"),
        (Scores(0.4, 0.5, 1.5), "does not rise"),
        (Scores(0.6, 0.5, 1.0), "collapse"),
    ],
)
def test_verdict(new: Scores, fault: str) -> None:
    faults = verdict(new, GOOD, 1.6, GateSettings())
    assert (fault in faults[0]) if fault else not faults


def test_a_wanted_rise_must_be_reached() -> None:
    settings = GateSettings(agreement_points=5)
    assert verdict(Scores(0.54, 0.1, 1.5), GOOD, 1.6, settings) and not verdict(Scores(0.56, 2.0, 1.5), GOOD, 1.6, settings)


def flips(gained: int, lost: int, cross_entropy: float) -> tuple[Scores, Scores]:
    """Scores on 40 pictures, 20 of which agreed before."""
    before = np.arange(40) < 20
    after = before.copy()
    after[:lost] = False
    after[40 - gained : 40] = True
    return Scores(float(after.mean()), cross_entropy, 1.5, after), Scores(0.5, 1.0, 1.5, before)


@pytest.mark.parametrize(
    ("gained", "lost", "cross_entropy", "passes"),
    [(2, 1, 1.1, True), (1, 2, 0.9, True), (1, 2, 1.1, False), (2, 6, 0.5, False), (0, 1, 0.9, True), (0, 2, 0.5, False)],
)
def test_a_change_within_chance_is_decided_by_the_cross_entropy(
    gained: int, lost: int, cross_entropy: float, passes: bool
) -> None:
    new, old = flips(gained, lost, cross_entropy)
    assert (not verdict(new, old, 1.6, GateSettings())) is passes
    strict = GateSettings(standard_errors=0)
    assert (not verdict(new, old, 1.6, strict)) is (gained > lost)


def test_few_classes_are_no_collapse_where_there_were_fewer_before() -> None:
    assert not verdict(Scores(0.6, 0.9, 0.5), Scores(0.5, 1.0, 0.2), 1.6, GateSettings())


def test_scores_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.3], [0.2, 0.8]], np.float32))
    teacher = np.array([[1, 0], [1, 0]], np.float32)
    scores = Scores.of(logits, teacher)
    assert scores.agreement == 0.5
    assert scores.cross_entropy == pytest.approx(-(np.log(0.7) + np.log(0.2)) / 2, rel=1e-6)
    assert scores.class_entropy == pytest.approx(np.log(2)) == histogram_entropy(np.array([0, 1]), 2)
    assert np.isfinite(Scores.of(np.array([[200.0, -200.0]], np.float32), np.array([[0, 1]], np.float32)).cross_entropy)


def candidate(states: dict[str, NormState], domain: str = "d1") -> Any:
    return SimpleNamespace(states=states, activations=(), domain=domain, samples=1, statistics_frames=1, metrics={})


@pytest.fixture(scope="module")
def mist(small: Bundle) -> tuple[Any, Any]:
    """(held-back pictures in the mist, what a teacher who sees through it thinks of them)."""
    held_back = shifted(images(64, 16, 7))
    return held_back, SeesThroughMist(small).probabilities(held_back, "d1")


def test_the_populations_statistics_pass(small: Bundle, mist: tuple[Any, Any]) -> None:
    states, _ = population(small, shifted(images(64, 16, 8)))
    result = Gate(small, WIDE).judge(candidate(states), None, *mist)
    assert result.passed, result.reasons
    assert result.metrics["agreement"] > result.metrics["agreement_before"] and result.metrics["held_back"] == 64
    assert result.reasons[0].startswith("agreement ")


def test_what_is_served_already_is_not_released_again(small: Bundle, mist: tuple[Any, Any]) -> None:
    states, _ = population(small, shifted(images(64, 16, 8)))
    served = Release(small.digest, "roof", 1, states, domain="d1")
    result = Gate(small, WIDE).judge(candidate(states), served, *mist)
    assert not result.passed and "does not rise" in result.reasons[0]


def test_a_candidate_must_beat_what_devices_do_alone(small: Bundle, mist: tuple[Any, Any]) -> None:
    states, report = population(small, shifted(images(64, 16, 8)))
    gate = Gate(small, WIDE)
    alone = gate.judge(candidate(states), None, *mist).metrics["cross_entropy_before"]
    overlaid = gate.judge(candidate(states), None, *mist, [report]).metrics["cross_entropy_before"]
    assert overlaid < alone
    assert not gate.judge(candidate({}), None, *mist, [report]).passed


def test_a_state_outside_the_trust_region_is_refused(small: Bundle, mist: tuple[Any, Any]) -> None:
    site = small.norms.norms[0]
    wild = NormState(-site.exported.gamma, site.exported.beta, site.exported.mean, site.exported.variance)
    result = Gate(small, WIDE).judge(candidate({site.name: wild}), None, *mist)
    assert not result.passed and result.reasons[0].startswith("not admissible")


def test_clean_accuracy_may_not_fall(small: Bundle) -> None:
    last = small.norms.norms[-1]
    state = last.exported
    ruined = NormState(
        state.gamma, state.beta + np.linspace(-4, 4, len(state.beta), dtype=np.float32), state.mean, state.variance
    )
    gate = Gate(small, GateSettings(shifted_clean_points=3))
    nothing = np.zeros((0, 16, 16, 3), np.uint8)
    for domain, allowed in (("d0", "0.5 are allowed"), ("", "0.5 are allowed"), ("d1", "3 are allowed")):
        result = gate.judge(candidate({last.name: ruined}, domain), None, nothing, None)
        assert not result.passed and "clean accuracy falls" in result.reasons[0] and allowed in result.reasons[0]


def test_without_a_teacher_the_calibration_slice_decides(small: Bundle) -> None:
    result = Gate(small, GateSettings()).judge(candidate({}, "d0"), None, shifted(images(4, 16)), None)
    assert result.passed and "without a teacher" in result.reasons[0] and result.metrics["clean_accuracy"] == 1.0


def test_a_shifted_domains_statistics_do_not_count_as_a_clean_loss(small: Bundle, mist: tuple[Any, Any]) -> None:
    states, _ = population(small, shifted(images(64, 16, 8)))
    result = Gate(small, GateSettings()).judge(candidate(states), None, *mist)
    assert result.passed and result.metrics["clean_accuracy"] == 1.0  # its gamma and beta are the exported ones
