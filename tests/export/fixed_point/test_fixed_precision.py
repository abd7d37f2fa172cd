"""The precision switch against the paper's formulae, and against what a push-down must never do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.fixed_point.number import FixedPoint
from export.fixed_point.precision import (
    Bounds,
    Strategy,
    divergence,
    gradient_diversity,
    lookback_after,
    next_strategy,
    push_down,
    push_up,
    resolution_after,
)

PAPER = Bounds()
OURS = Bounds(8, None)


def weights(deviation: float = 0.05, count: int = 4000) -> torch.Tensor:
    return deviation * torch.randn(count, generator=torch.Generator().manual_seed(0))


def published(fl: int, wl: int, d: float, strategy: Strategy, buffer: int = 8) -> tuple[int, int]:
    """The push-up as the specification's lines say it, one by one."""
    if d > 0:
        s1 = max(math.ceil(1 / d**2), 1)
        s2 = max(min(math.ceil(32 * d**2), 32) - fl, 0)
        s = {Strategy.MIN: min(s1, s2), Strategy.MEAN: math.ceil((s1 + s2) / 2), Strategy.MAX: max(s1, s2)}[strategy]
    else:
        s = 1
    fl = min(fl + s, 32)
    wl = min(max(wl, fl) + 1, 32)
    fl = min(fl, 32 - buffer)
    return max(min(fl + buffer, 32), wl), fl


@given(st.integers(0, 24), st.integers(2, 32), st.floats(1.0, 200.0), st.sampled_from(Strategy))
def test_push_up_is_the_papers(fl, wl, diversity, strategy):
    d = math.log(diversity) - 1
    got = push_up(FixedPoint(wl, fl), diversity, strategy, 1.0, PAPER)
    assert (got.word, got.fraction) == published(fl, wl, d, strategy)


@given(st.integers(-2, 12), st.integers(2, 8), st.floats(1.0, 1e6) | st.just(math.inf), st.sampled_from(Strategy),
       st.floats(0.01, 8.0))  # fmt: skip
def test_push_up_in_short_words_still_holds_the_largest_weight(fl, wl, diversity, strategy, largest):
    got = push_up(FixedPoint(wl, fl, narrow=True), diversity, strategy, largest, OURS)
    assert wl <= got.word <= 8 and got.narrow
    assert got.highest + got.step >= largest


@pytest.mark.parametrize("count", [25, 28])
@given(word=st.integers(4, 8), fraction=st.integers(2, 9))
def test_a_push_up_of_a_short_word_does_not_undo_a_push_down(count, word, fraction):
    """Independent gradients have diversity sqrt(count); measured by 32 bits they ask for more than any short word has."""
    largest = (2 ** (word - 1) - 1) * 2.0**-fraction  # the word's own
    kept = push_up(FixedPoint(word, fraction, narrow=True), math.sqrt(count), Strategy.MIN, largest, OURS)
    assert (kept.word, kept.fraction) == (word, fraction)
    eager = push_up(FixedPoint(word, fraction, narrow=True), math.sqrt(count), Strategy.MAX, largest, OURS)
    assert kept.word <= eager.word <= 8 and (eager.word > word or word == 8)


@given(st.integers(1, 100), st.floats(0, 100))
def test_gradient_diversity_is_at_least_one(count, norm):
    assert gradient_diversity(count, min(norm, count)) >= 1
    assert gradient_diversity(count, float(count)) == 1 and math.isinf(gradient_diversity(count, 0.0))


@given(st.integers(25, 100), st.floats(1, 1e9) | st.just(math.inf), st.floats(0.05, 1.0))
def test_lookback_stays_in_its_bounds(lookback, diversity, momentum):
    assert 25 <= lookback_after(lookback, diversity, 25, 100, momentum) <= 100
    assert lookback_after(lookback, diversity, 25, 100, 1.0) == math.ceil(min(max(100 / diversity, 25), 100))


def test_resolution_moves_at_the_ends_of_the_lookback():
    assert resolution_after(60, 100, 25, 100, (50, 150)) == 61
    assert resolution_after(60, 25, 25, 100, (50, 150)) == 59
    assert resolution_after(60, 40, 25, 100, (50, 150)) == 60
    assert resolution_after(150, 100, 25, 100, (50, 150)) == 150 and resolution_after(50, 25, 25, 100, (50, 150)) == 50


def test_the_strategy_grows_eager_while_nothing_falls():
    falling, flat = [3.0, 2.0, 1.5], [1.0, 1.0, 1.0]
    assert next_strategy(Strategy.MEAN, falling, 1.0, 3.0) is Strategy.MIN
    assert next_strategy(Strategy.MIN, flat, 1.0, 3.0) is Strategy.MEAN
    assert next_strategy(Strategy.MEAN, flat, 1.2, 3.0) is Strategy.MAX
    assert next_strategy(Strategy.MAX, flat, 1.2, 3.0) is Strategy.MAX
    assert next_strategy(Strategy.MIN, [9.0, 9.0, 1.0], 2.0, 1.0) is Strategy.MEAN  # only the last step counts


def test_noise_around_a_falling_loss_is_progress():
    """One step's loss lies above the mean half of the time: judged by means and their errors, only a rise is none."""
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    falling = [3 - 0.002 * i + 0.2 * n for i, n in enumerate(noise)]
    level = [1 + 0.2 * n for n in noise]
    rising = [1 + 0.01 * i + 0.2 * n for i, n in enumerate(noise)]

    def eager(losses: list[float], errors: float | None) -> float:
        found = [next_strategy(Strategy.MIN, losses[:i], losses[i], 40, errors) for i in range(80, 400)]
        return sum(s is Strategy.MEAN for s in found) / len(found)

    assert 0.3 < eager(falling, None) < 0.6  # the published rule
    assert eager(falling, 2.0) == 0 and eager(level, 2.0) < 0.1 and eager(rising, 2.0) > 0.9
    assert next_strategy(Strategy.MAX, [1.0], 5.0, 40, 2.0) is Strategy.MIN  # too little to tell


def test_divergence_is_a_real_one():
    """The specification's own measurement: 22 nats at <8,4> and 5e-5 at <16,14>, N(0, 0.05), 150 bins."""
    w = weights(count=100_000)
    coarse, fine = (divergence(w, f.nearest(w), 150) for f in (FixedPoint(8, 4), FixedPoint(16, 14)))
    assert 15 < coarse < 26 and 0 < fine < 5e-4
    assert divergence(w, w, 150) == 0.0
    constant = torch.full((9,), 0.3)
    assert divergence(constant, constant, 50) == 0.0 and math.isinf(
        divergence(constant, FixedPoint(8, 2).nearest(constant), 50)
    )


@given(st.integers(4, 16), st.integers(10, 150), st.floats(0.01, 3.0))
def test_divergence_is_never_negative(fraction, bins, deviation):
    w = weights(deviation, 500)
    assert divergence(w, FixedPoint(16, fraction).nearest(w), bins) >= 0


def test_mass_outside_the_range_counts():
    """Saturation moves mass into the outermost bins; it must not vanish from the histogram."""
    w = weights(1.0)
    assert divergence(w, FixedPoint(8, 9).nearest(w), 50) > 1.0


@given(st.integers(8, 32), st.integers(4, 24), st.floats(1e-4, 0.1), st.floats(0.01, 1.0))
def test_push_down_keeps_the_histogram_or_the_format(word, fraction, tolerance, deviation):
    w, form = weights(deviation, 1000), FixedPoint(word, fraction, narrow=True)
    got = push_down(form, w, 80, tolerance, PAPER)
    assert got.word <= form.word and 4 <= got.fraction <= form.fraction
    if got.fraction != form.fraction:
        assert divergence(w, FixedPoint(word, got.fraction).nearest(w), 80) <= tolerance
    if got.word != form.word:
        assert divergence(w, got.nearest(w), 80) <= tolerance


def test_push_down_saves_bits_and_zero_tolerance_does_not():
    w, form = weights(), FixedPoint(32, 24, narrow=True)
    loose, usual, strict = (push_down(form, w, 100, t, PAPER) for t in (0.05, 1e-3, 0.0))
    assert loose.word < usual.word < 24 and loose.fraction <= usual.fraction < strict.fraction
    assert strict.word >= usual.word
    assert divergence(w, loose.nearest(w), 100) <= 0.05


def test_push_down_looks_at_the_whole_tensor():
    """The published code looks at the first output channel, which may be all zeros."""
    w = torch.zeros(8, 500)
    w[1:] = weights(count=3500).reshape(7, 500)
    form = FixedPoint(32, 24)
    assert push_down(form, w, 100, 1e-3, PAPER).fraction > 8


@pytest.mark.parametrize("longest", [4, 6, 8])
def test_short_words_go_under_their_fraction(longest):
    w = weights(0.01, 4000)
    form = push_up(FixedPoint(longest, 4), 1.0, Strategy.MAX, float(w.abs().max()), Bounds(longest, None))
    for _ in range(12):
        form = push_up(form, 1.0, Strategy.MAX, float(w.abs().max()), Bounds(longest, None))
    assert form.word == longest and form.fraction > longest - 1
    assert form.highest + form.step >= float(w.abs().max()) > form.highest / 2
