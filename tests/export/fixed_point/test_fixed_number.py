"""<WL,FL>: the grid, its ends, and two ways of rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.fixed_point.number import FixedPoint, largest_fraction, quantise
from refold.errors import UsageError

forms = st.builds(
    FixedPoint, st.integers(2, 16), st.integers(-4, 20), signed=st.booleans(), narrow=st.booleans()
)  # words whose codes float32 holds
values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40).map(torch.tensor)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(forms, values, st.booleans())
def test_every_output_is_on_the_grid_and_in_range(form, x, at_random):
    y = form.stochastic(x, generator()) if at_random else form.nearest(x)
    codes = y.double() * 2.0**form.fraction
    assert torch.equal(codes, codes.round())
    assert float(y.min()) >= form.lowest and float(y.max()) <= form.highest
    inside = (x >= form.lowest) & (x <= form.highest)
    apart = (y - x).abs()[inside]
    assert bool((apart <= (form.step if at_random else form.step / 2)).all())
    assert bool((y[x > form.highest] == form.highest).all()) and bool((y[x < form.lowest] == form.lowest).all())


@given(forms, values)
def test_quantising_twice_is_quantising_once(form, x):
    y = form.nearest(x)
    assert form.holds(y)
    assert torch.equal(form.nearest(y), y) and torch.equal(form.stochastic(y, generator(3)), y)


@given(forms, values)
def test_codes_give_the_values_back(form, x):
    y = form.nearest(x)
    codes = form.codes(y.numpy())
    assert codes.min() >= form.lowest_code and codes.max() <= form.highest_code
    assert np.array_equal((codes * form.step).astype(np.float32), y.numpy())


@given(st.integers(0, 12), st.floats(-0.5, 0.5, width=32))
def test_stochastic_rounding_is_right_on_average(fraction, x):
    form, count = FixedPoint(16, fraction), 20_000
    y = form.stochastic(torch.full((count,), x), generator(1))
    # The mean of `count` draws, each within one step: six standard deviations.
    assert abs(float(y.double().mean()) - x) <= 6 * 0.5 * form.step / count**0.5


def test_nearest_loses_what_stochastic_rounding_keeps():
    form, small = FixedPoint(8, 4), torch.full((10_000,), 0.01)
    assert float(form.nearest(small).sum()) == 0.0
    assert 60 < float(form.stochastic(small, generator()).sum()) < 140


@pytest.mark.parametrize(("signed", "narrow", "low", "high"), [
    (True, False, -8.0, 7.9375), (True, True, -7.9375, 7.9375), (False, False, 0.0, 15.9375),
])  # fmt: skip
def test_the_range_is_the_papers(signed, narrow, low, high):
    form = FixedPoint(8, 4, signed, narrow)
    assert (form.lowest, form.highest, form.step) == (low, high, 1 / 16)
    assert form.zero_point == (128 if signed else 0)


@given(st.integers(2, 24), st.floats(2.0**-20, 2.0**20), st.booleans())
def test_the_largest_fraction_holds_and_the_next_does_not(word, largest, signed):
    fraction = largest_fraction(word, largest, signed)
    form, finer = FixedPoint(word, fraction, signed), FixedPoint(word, fraction + 1, signed)
    assert form.highest + form.step >= largest > finer.highest + finer.step
    assert largest_fraction(word, 0.0, signed) == word - signed


def test_gradients_go_straight_through_inside_the_range():
    x = torch.tensor([-9.0, -8.0, 0.03, 7.9375, 8.5], requires_grad=True)
    y = quantise(x, FixedPoint(8, 4))
    (y * torch.arange(1.0, 6.0)).sum().backward()
    assert y.tolist() == [-8.0, -8.0, 0.0, 7.9375, 7.9375]
    assert x.grad is not None and x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_ties_go_to_the_even_code_as_engines_round():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert FixedPoint(8, 0).nearest(x).tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]
    assert torch.equal(FixedPoint(8, 0).nearest(x), torch.fake_quantize_per_tensor_affine(x, 1.0, 128, 0, 255))


@pytest.mark.parametrize(("word", "fraction"), [(1, 0), (33, 0), (8, 65), (8, -65)])
def test_impossible_formats_are_refused(word, fraction):
    with pytest.raises(UsageError):
        FixedPoint(word, fraction)
