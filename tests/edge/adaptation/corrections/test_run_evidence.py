"""The switch: its formulae against counting, no evidence where the order says nothing, and an end within bounds."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.adaptation.corrections import Corrector, Lame, RequestCorrector, RunEvidence, RunSettings, make_corrector
from edge.adaptation.corrections.evidence import improbability
from refold.errors import UsageError


def agreement(classes):
    pairs = list(combinations(classes, 2))
    return sum(a == b for a, b in pairs) / len(pairs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=80))
def test_share_and_improbability_are_the_formulae_of_the_last_frames(classes):
    evidence = RunEvidence(4, RunSettings(window=6, reference=30, least=12))
    for c in classes:
        evidence.saw(c)
    newest, known = classes[-6:], classes[-30:]
    a, q = agreement(newest), agreement(known)
    assert evidence.share == pytest.approx((a - q) / (1 - q) if q < 1 else 0.0)
    few, many = np.bincount(newest, minlength=4) / 6, np.bincount(known, minlength=4) / len(known)
    nats = 6 * sum(f * np.log(f / m) for f, m in zip(few, many, strict=True) if f)
    bound = np.exp(-nats) * (np.e * nats / 3) ** 3 if nats > 3 else 1.0
    assert evidence.improbability == pytest.approx(-np.log(bound) if a > q else 0.0, abs=1e-9)


def test_the_mean_agreement_under_every_order_is_exact():
    known = [0, 0, 0, 1, 1, 2, 2, 2]
    found = [agreement(s) for s in combinations(known, 4)]  # every set of newest frames has the same probability
    assert np.mean(found) == pytest.approx(agreement(known))


@pytest.mark.parametrize("mix", [[0.5, 0.5], [0.9, 0.1], [0.1] * 10, [0.7, *[0.1] * 3]])
def test_the_bound_is_not_below_what_draws_without_replacement_show(mix):
    rng = np.random.default_rng(0)
    known = np.repeat(np.arange(len(mix)), np.round(np.array(mix) * 1000).astype(int))
    few = rng.multivariate_hypergeometric(np.bincount(known), 64, size=20_000) / 64
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = 64 * np.where(few > 0, few * np.log(few / np.array(mix)), 0.0).sum(1)
    for x in np.quantile(nats, [0.5, 0.9, 0.99, 0.999]):
        assert np.mean(nats >= x) <= np.exp(-improbability(float(x), len(mix))) * 1.05
    assert improbability(len(mix) - 1.0, len(mix)) == 0.0 and improbability(5.0, 1) == 0.0


def after(evidence, classes):
    return [evidence.saw(int(c)) for c in classes]


@pytest.mark.parametrize("mix", [[0.1] * 10, [0.7, *[0.3 / 9] * 9], [0.5, 0.5], [0.97, 0.03]])
def test_shuffled_streams_do_not_switch_it_on_whatever_their_class_mix(mix):
    rng = np.random.default_rng(0)
    evidence = RunEvidence(len(mix))
    after(evidence, rng.choice(len(mix), 40_000, p=mix))
    assert evidence.switches == 0


def test_a_thousand_classes_do_not_switch_it_on_by_chance():
    evidence = RunEvidence(1000)
    after(evidence, np.random.default_rng(1).integers(0, 1000, 20_000))
    assert evidence.switches == 0


def test_one_class_from_the_start_is_no_evidence():
    evidence = RunEvidence(10)
    assert not any(after(evidence, [3] * 3000)) and evidence.share == 0.0


def test_runs_switch_it_on_and_a_shuffled_stream_off_within_a_window():
    rng = np.random.default_rng(2)
    evidence = RunEvidence(10)
    runs = np.repeat(rng.integers(0, 10, 60), 20)
    on = after(evidence, runs)
    assert np.mean(on[200:]) > 0.95 and not any(on[:127])
    later = after(evidence, rng.integers(0, 10, 2000))
    assert not any(later[evidence.settings.window :])


def test_it_is_gone_when_the_stream_has_taken_a_narrower_mix():
    rng = np.random.default_rng(3)
    evidence = RunEvidence(10)
    after(evidence, rng.integers(0, 10, 1000))
    on = after(evidence, rng.integers(0, 2, 9000))  # two of ten classes, shuffled, from now on
    assert on[200] and not any(on[evidence.settings.reference :])


def test_forgetting_switches_off_at_once():
    evidence = RunEvidence(10)
    after(evidence, np.repeat(np.arange(10), 60))
    assert evidence.on
    evidence.forget()
    assert not evidence.on and evidence.switches == 2
    assert not any(after(evidence, np.repeat(np.arange(2), 60)))


def sharp(c, classes=6):
    return (np.eye(classes, dtype=np.float32)[c] * 5).astype(np.float32)


def test_a_corrector_is_the_identity_until_the_evidence_is_there():
    corrector = make_corrector("lame", 6)
    assert corrector is not None
    answers = [corrector.answer(sharp(c), "d0") for c in np.repeat(np.arange(6), 40)]
    assert all(a is None for a in answers[:127]) and answers[-1] is not None
    assert corrector.metrics()["corrected_frames"] == sum(a is not None for a in answers)
    assert corrector.answer(sharp(5), "d1") is None  # another domain: begun anew
    assert corrector.metrics()["correction_on"] == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite_change_nothing(bad):
    corrector, other = make_corrector("auto", 6), make_corrector("auto", 6)
    for c in np.repeat(np.arange(6), 40):
        row = sharp(c)
        row[2] = bad
        with np.errstate(all="ignore"):
            assert corrector.answer(row, "d0") is None
        one, two = corrector.answer(sharp(c), "d0"), other.answer(sharp(c), "d0")
        assert (one is None) == (two is None) and (one is None or np.array_equal(one, two))


def test_requests_in_one_batch_are_frames_in_order():
    corrector = make_corrector("lame", 6)
    requests = RequestCorrector(make_corrector("lame", 6), lambda: "d0")
    rows = np.stack([sharp(c) for c in np.repeat(np.arange(6), 40)])
    want = [corrector.answer(row, "d0") for row in rows]
    got = [answer for batch in np.split(rows, 24) for answer in requests.answer(batch)]
    assert [a is None for a in got] == [a is None for a in want]
    assert all(a is None or np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_memory_is_declared_and_does_not_grow():
    corrector = Corrector(Lame(10), RunEvidence(10))
    before = corrector.memory_bytes
    for c in np.random.default_rng(0).integers(0, 10, 6000):
        corrector.evidence.saw(int(c))
    assert corrector.memory_bytes == before < 2**17
    assert len(corrector.evidence._all) == 4096 and len(corrector.evidence._newest) == 64


def test_names():
    assert make_corrector("off", 1) is None
    with pytest.raises(UsageError, match="no correction 'lama'; choose one of: off, auto, lame, t3a, adanpc"):
        make_corrector("lama", 10)
    with pytest.raises(UsageError, match="at least two"):
        make_corrector("lame", 1)
