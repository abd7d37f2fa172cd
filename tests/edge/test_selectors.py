"""Selectors: the published thresholds frame by frame, the rate kept whatever the stream, and a random share that is random."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.select import (
    SELECTORS,
    Budget,
    BudgetSelector,
    CemaPaper,
    CemaPaperSelector,
    Eata,
    EataSelector,
    entropy_of,
    make_selector,
    rate_within,
)
from edge.select.eata import redundancy_for
from edge.select.verdict import informativeness
from refold.errors import UsageError

LN10 = math.log(10)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def stream(seed, n, sharpness=3.0, classes=10):
    return softmax(np.random.default_rng(seed).normal(0, sharpness, (n, classes)))


def with_entropy(target, classes=10):
    """A prediction of one peak and an even rest whose entropy is `target` nats."""
    low, high = 1.0 / classes, 1.0 - 1e-9
    for _ in range(80):
        p = (low + high) / 2
        h = -p * math.log(p) - (1 - p) * math.log((1 - p) / (classes - 1))
        low, high = (p, high) if h > target else (low, p)
    return np.array([p] + [(1 - p) / (classes - 1)] * (classes - 1), np.float32)


@given(st.integers(2, 200), st.floats(0.01, 20), st.integers(0, 2**32 - 1))
def test_entropy_is_that_of_float64(classes, sharpness, seed):
    p = stream(seed, 1, sharpness, classes)[0]
    wide = p.astype(np.float64)
    exact = -float((wide[wide > 0] * np.log(wide[wide > 0])).sum())
    assert entropy_of(p) == pytest.approx(exact, abs=1e-4) and entropy_of(p) >= 0


def test_entropy_of_certainty_is_zero():
    assert entropy_of(np.eye(10, dtype=np.float32)[3]) == 0.0


def test_cema_reproduces_the_threshold_of_a_recorded_entropy_stream():
    """E_max^t = 0.4 ln C * Ebar^t / Ebar^0 * lambda, from the entropies alone (specs/cema.md §1.2)."""
    entropies = np.concatenate([np.linspace(0.9, 1.1, 50), np.linspace(1.1, 0.2, 150)])
    selector = CemaPaperSelector(CemaPaper(warm_up=50, coefficient=0.9), 10)
    for t, target in enumerate(entropies, start=1):
        verdict = selector.judge(with_entropy(target))
        assert verdict.entropy == pytest.approx(target, abs=1e-4)
        mean, reference = entropies[:t].mean(), entropies[:50].mean()
        expected = 0.4 * LN10 * (1.0 if t < 50 else mean / reference * 0.9)
        assert selector.threshold == pytest.approx(expected, rel=1e-4)
        assert verdict.keep == (0.02 * LN10 < target < expected)


def test_cema_does_not_compound_its_coefficient():
    selector = CemaPaperSelector(CemaPaper(warm_up=10, coefficient=0.6), 10)
    for _ in range(500):
        selector.judge(with_entropy(0.5))
    assert selector.threshold == pytest.approx(0.6 * 0.4 * LN10, rel=1e-5)


def test_cema_uploads_less_as_the_mean_entropy_falls():
    rng = np.random.default_rng(0)
    adapting = CemaPaperSelector(CemaPaper(warm_up=100), 10)
    frozen = CemaPaperSelector(CemaPaper(warm_up=100), 10)
    first = rng.uniform(0.0, 2.0, 400)
    for h in first:
        adapting.judge(with_entropy(h))
        frozen.judge(with_entropy(h))
    for _ in range(2000):
        adapting.judge(with_entropy(0.05))
    later = rng.uniform(0.0, 2.0, 400)
    assert sum(adapting.judge(with_entropy(h)).keep for h in later) < 0.7 * sum(
        frozen.judge(with_entropy(h)).keep for h in later
    )


@pytest.mark.parametrize(
    ("entropy", "reason"), [(0.01 * LN10, "uninformative"), (0.2 * LN10, "kept"), (0.41 * LN10, "unreliable")]
)
def test_cema_excludes_both_ends(entropy, reason):
    assert make_selector("cema-paper", 10).judge(with_entropy(entropy)).reason == reason


def eata_by_the_book(probs, high, eps):
    kept, mean = [], None
    for p in probs.astype(np.float64):
        h = -(p * np.log(p + 1e-30)).sum()
        keep = h < high
        if keep and mean is not None:
            keep = abs(p @ mean / np.linalg.norm(p) / np.linalg.norm(mean)) < eps
        if keep:
            mean = p if mean is None else 0.9 * mean + 0.1 * p
        kept.append(bool(keep))
    return kept


@pytest.mark.parametrize(("name", "classes", "eps"), [("eata", 10, 0.4), ("eata", 100, 0.1), ("cema-released", 100, 0.05)])
def test_eata_and_released_cema_keep_what_their_definition_keeps(name, classes, eps):
    probs = stream(1, 800, 3.5, classes)
    selector = make_selector(name, classes)
    kept = [selector.judge(p).keep for p in probs]
    assert kept == eata_by_the_book(probs, 0.4 * math.log(classes), eps)
    assert 5 < sum(kept) < 600


def test_eata_bounds_the_cosine_by_the_number_of_classes():
    assert [redundancy_for(c) for c in (10, 100, 1000, 5000)] == pytest.approx([0.4, 0.1, 0.05, 0.05])
    assert 0.4 < redundancy_for(5) < redundancy_for(2) == pytest.approx(1.0)
    assert EataSelector(Eata(redundancy=0.2), 10).redundancy == 0.2


@given(st.floats(0.01, 0.6), st.floats(0, 1), st.floats(0.3, 6), st.integers(0, 2**32 - 1), st.sampled_from([2, 10, 100]))
def test_the_budget_is_never_exceeded(rate, share, sharpness, seed, classes):
    settings = Budget(rate=rate, unbiased=share, seed=seed)
    selector = BudgetSelector(settings, classes)
    verdicts = [selector.judge(p) for p in stream(seed, 600, sharpness, classes)]
    chosen = sum(v.keep and not v.unbiased for v in verdicts)
    assert chosen <= rate * 600 + settings.burst


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_the_budget_is_used_on_any_domain(sharpness):
    """The threshold finds the wanted rate on flat and on peaked predictions, and again after a change between them."""
    selector = BudgetSelector(Budget(rate=0.1), 10)
    for p in stream(2, 1500, 3.0):
        selector.judge(p)
    kept = sum(selector.judge(p).keep for p in stream(3, 3000, sharpness))
    assert 0.07 * 3000 < kept < 0.115 * 3000


def test_the_best_frames_are_chosen():
    selector = BudgetSelector(Budget(rate=0.1, unbiased=0.0, balance=0.0), 10)
    verdicts = [selector.judge(p) for p in stream(4, 4000)][1000:]
    kept = [v.score for v in verdicts if v.keep]
    assert np.mean(kept) > np.quantile([v.score for v in verdicts], 0.9)


def test_the_random_share_does_not_look_at_the_model():
    """The same frames are drawn whatever the predictions are, at the rate asked for, all with one score."""
    settings = Budget(rate=0.2, unbiased=0.5, seed=7)
    drawn = []
    for sharpness in (0.2, 8.0):
        selector = BudgetSelector(settings, 10)
        verdicts = [selector.judge(p) for p in stream(5, 5000, sharpness)]
        drawn.append([v.unbiased for v in verdicts])
        assert {v.score for v in verdicts if v.unbiased} == {1.0}
    assert drawn[0] == drawn[1]
    assert 0.08 * 5000 < sum(drawn[0]) < 0.12 * 5000


def test_a_rare_class_is_preferred():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (6000, 10))
    logits[:, 0] += np.where(rng.random(6000) < 0.9, 4.0, 0.0)
    probs = softmax(logits)

    def share(balance):
        selector = BudgetSelector(Budget(rate=0.1, unbiased=0.0, balance=balance), 10)
        kept = [int(p.argmax()) for p in probs if selector.judge(p).keep]
        return kept.count(0) / len(kept)

    assert share(1.0) < 0.7 * share(0.0)


def test_spacing_leaves_frames_out():
    selector = BudgetSelector(Budget(rate=1.0, unbiased=0.0, spacing=4), 10)
    kept = [i for i, p in enumerate(stream(6, 300, 2.0)) if selector.judge(p).keep]
    assert len(kept) > 20 and min(np.diff(kept)) >= 5


def test_a_budget_of_nothing_keeps_nothing():
    selector = BudgetSelector(Budget(rate=0.0), 10)
    assert sum(selector.judge(p).keep for p in stream(8, 2000)) <= 1
    selector.set_rate(0.5)
    assert sum(selector.judge(p).keep for p in stream(9, 2000)) > 500


def test_a_budget_for_everything_keeps_everything():
    selector = BudgetSelector(Budget(rate=1.0), 10)
    assert sum(selector.judge(p).keep for p in stream(8, 1000)) > 990


def test_a_byte_budget_becomes_a_rate():
    assert rate_within(3600 * 1000, 1000, 10.0) == pytest.approx(0.1)
    assert rate_within(None, 1000, 10.0) == 1.0 and rate_within(0, 1000, 10.0) == 0.0 and rate_within(10**9, 1, 0.0) == 1.0


@pytest.mark.parametrize("name", SELECTORS)
def test_a_prediction_that_is_not_finite_is_named_and_leaves_no_trace(name):
    broken, sound = make_selector(name, 10), make_selector(name, 10)
    for p in stream(10, 300, 2.0):
        assert broken.judge(np.full(10, np.nan, np.float32)).reason == "not-finite"
        assert broken.judge(p) == sound.judge(p)


@pytest.mark.parametrize("name", SELECTORS)
def test_the_same_stream_gives_the_same_verdicts(name):
    first, second = make_selector(name, 10), make_selector(name, 10)
    assert [first.judge(p) for p in stream(11, 300)] == [second.judge(p) for p in stream(11, 300)]


def test_middling_entropy_is_the_most_informative():
    assert informativeness(LN10 / 2, LN10) == pytest.approx(1.0)
    assert informativeness(0.0, LN10) == informativeness(LN10, LN10) == 0.0
    assert informativeness(0.3 * LN10, LN10, 0.3) == pytest.approx(1.0)
    assert informativeness(0.6 * LN10, LN10, 0.3) < 1.0


@pytest.mark.parametrize(
    ("name", "classes", "settings", "says"),
    [
        ("best", 10, None, "no selector"),
        ("eata", 1, None, "two classes"),
        ("eata", 10, {"epsilon": 1}, "no setting"),
        ("eata", 10, {"high": "much"}, "must be a number"),
        ("eata", 10, {"high": None}, "wrong type"),
        ("eata", 10, {"redundancy": 2}, "redundancy"),
        ("budget", 10, {"rate": 2}, "rate"),
        ("budget", 10, CemaPaper(), "give Budget"),
        ("cema-paper", 10, {"low": 0.5}, "low < high"),
    ],
)
def test_wrong_settings_are_explained(name, classes, settings, says):
    with pytest.raises(UsageError, match=says):
        make_selector(name, classes, settings)
