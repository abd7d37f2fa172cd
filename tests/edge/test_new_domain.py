"""The quota of a new domain: more frames early, chosen at random, within the hour's bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.select import Budget, BudgetSelector, NewDomain, NewDomainSelector, innermost, make_selector, room
from edge.select.verdict import Verdict
from refold.errors import UsageError


class Scene:
    """A device's present domain, and a selector with the default budget around it."""

    def __init__(self, settings: NewDomain | None = None, known: tuple[str, ...] = (), rate: float = 0.05) -> None:
        self.domain = "d0"
        self.selector = NewDomainSelector(
            BudgetSelector(Budget(rate=rate), 10), settings or NewDomain(), lambda: self.domain, known
        )
        self._rng = np.random.default_rng(1)

    def frames(self, count: int, sharpness: float = 2.0) -> list[Verdict]:
        logits = self._rng.normal(0, sharpness, (count, 10))
        p = np.exp(logits - logits.max(1, keepdims=True))
        return [self.selector.judge(row) for row in (p / p.sum(1, keepdims=True)).astype(np.float32)]


def kept(verdicts: list[Verdict], *reasons: str) -> int:
    return sum(v.keep and (not reasons or v.reason in reasons) for v in verdicts)


def test_a_camera_sends_its_quota_within_the_first_thousand_frames_of_a_new_domain() -> None:
    scene = Scene()
    assert kept(scene.frames(1000), "new-domain") == 0  # home is not new
    scene.domain = "d1"
    verdicts = scene.frames(1000)
    assert kept(verdicts, "new-domain") == 384 == scene.selector.kept
    first = [i for i, v in enumerate(verdicts) if v.reason == "new-domain"]
    assert first[0] >= 24 and first[-1] < 900
    assert all(v.unbiased and v.score == 1.0 for v in verdicts if v.reason == "new-domain")
    assert kept(scene.frames(1000)) < 80  # and then as ever


def test_each_domain_has_its_own_quota_and_a_known_one_has_had_it() -> None:
    scene = Scene(NewDomain(uploads=20, rate=1.0), known=("d0", "d1"))
    for domain, quota in (("d1", 0), ("d2", 20), ("d3", 20), ("d2", 0)):
        scene.domain = domain
        assert kept(scene.frames(100), "new-domain") == quota, domain


def test_an_alarm_that_was_none_costs_nothing() -> None:
    scene = Scene()
    for i in range(30):
        scene.domain = f"d{i + 1}"
        assert kept(scene.frames(24), "new-domain") == 0


def test_the_choice_does_not_look_at_the_model() -> None:
    drawn = []
    for sharpness in (0.2, 8.0):
        scene = Scene(rate=0.0)
        scene.domain = "d1"
        drawn.append([v.reason == "new-domain" for v in scene.frames(600, sharpness)])
    assert drawn[0] == drawn[1]


def test_no_more_than_the_hours_bytes_carry() -> None:
    scene = Scene(NewDomain(uploads=100, rate=1.0), rate=0.0)
    scene.domain = "d1"
    scene.selector.allow(room(100_000, 40_000, 2000.0))
    assert kept(scene.frames(200), "new-domain") == 30
    scene.selector.allow(room(None, 40_000, 2000.0))
    assert kept(scene.frames(200), "new-domain") == 70
    assert room(1000, 5000, 10.0) == 0 and room(None, 0, 1.0) == math.inf


def test_what_is_not_finite_is_not_kept() -> None:
    scene = Scene(NewDomain(rate=1.0, steady=0))
    scene.domain = "d1"
    assert not scene.selector.judge(np.full(10, np.nan, np.float32)).keep


@given(st.integers(0, 300), st.floats(0, 1), st.lists(st.sampled_from(["d0", "d1", "d2", "d3"]), max_size=12))
def test_the_quota_is_never_exceeded(uploads: int, rate: float, visits: list[str]) -> None:
    scene = Scene(NewDomain(uploads=uploads, rate=rate, steady=3), rate=0.0)
    sent = dict.fromkeys(("d0", "d1", "d2", "d3"), 0)
    for domain in visits:
        scene.domain = domain
        sent[domain] += kept(scene.frames(40), "new-domain")
    assert sent["d0"] == 0 and all(n <= uploads for n in sent.values())


def test_any_selector_can_be_inside() -> None:
    inner = make_selector("eata", 10)
    outer = NewDomainSelector(NewDomainSelector(inner, NewDomain(), lambda: "d1"), NewDomain(), lambda: "d1")
    assert innermost(outer) is inner and innermost(inner) is inner and innermost(None) is None
    for wrong in ({"rate": 1.5}, {"uploads": -1}, {"steady": -1}):
        with pytest.raises(UsageError):
            NewDomain(**wrong)  # type: ignore[arg-type]
