"""The quantiser: values, gradients against the relaxed function, and an exact zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.elastic.initial import EPS, zero_anchored
from export.elastic.quantisers import Table, ValueQuantiser, WeightQuantiser
from export.elastic.rounding import activation_codes, elastic_round, integer_codes, weight_codes
from export.elastic.space import ActivationForm, WeightForm


def relaxed(x, s, z, codes):
    """What the gradients are those of: the rounding error held constant inside, the bound held outside."""
    low, high = codes.bounds(z.detach().round())
    with torch.no_grad():
        error = torch.round(x / s) - x / s
        q = torch.round(x / s) + z.round()
        inside = (q >= low) & (q <= high)
        bound = torch.where(q > high, high, low)
    return torch.where(inside, x + s * error, s * (bound - z)), inside


@pytest.mark.parametrize("codes", [weight_codes(3, True), weight_codes(2, False), activation_codes(4)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_are_those_of_the_relaxed_function(codes, per_channel):
    torch.manual_seed(0)
    x = torch.randn(4, 30, dtype=torch.float64) * 3 + 0.011
    rows = 4 if per_channel else 1
    s = (torch.rand(rows, 1, dtype=torch.float64) + 0.3).requires_grad_(True)
    z = torch.randint(max(codes.low, -2), min(codes.high, 2) + 1, (rows, 1)).double().requires_grad_(True)
    x.requires_grad_(True)
    weight = torch.randn(4, 30, dtype=torch.float64)
    (elastic_round(x, s, z, codes, 1.0) * weight).sum().backward()
    got = x.grad.clone(), s.grad.clone(), z.grad.clone()
    for tensor in (x, s, z):
        tensor.grad = None
    y, inside = relaxed(x, s, z, codes)
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(y.detach().round(decimals=9), elastic_round(x, s, z, codes, 1.0).detach().round(decimals=9))
    (y * weight).sum().backward()
    # The straight-through estimate passes x's gradient inside only; s and z follow the function itself.
    torch.testing.assert_close(got[0], weight * inside)
    torch.testing.assert_close(got[1], s.grad)
    torch.testing.assert_close(got[2], z.grad)


def test_the_relaxed_step_gradient_agrees_with_finite_differences():
    codes, h = activation_codes(3), 1e-6
    x, z = torch.tensor([-0.9, 0.24, 1.31, 9.0], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    elastic_round(x, s, z, codes, 1.0).sum().backward()

    def value(step: float) -> float:
        errors = torch.round(x / 0.5) - x / 0.5  # of the point itself
        inside = torch.tensor([True, True, True, False])
        return float(torch.where(inside, x + step * errors, step * (7 - z)).sum())

    assert float(s.grad) == pytest.approx((value(0.5 + h) - value(0.5 - h)) / (2 * h), rel=1e-6)


def test_hand_values():
    codes = weight_codes(3, True)  # -3..3
    x = torch.tensor([0.24, -0.26, 5.0, -5.0])
    s, z = torch.tensor(0.5, requires_grad=True), torch.tensor(0.0)
    y = elastic_round(x, s, z, codes, 1.0)
    assert y.tolist() == [0.0, -0.5, 1.5, -1.5]
    y[1].backward()
    assert float(s.grad) == pytest.approx(-1 + 0.52)
    s.grad = None
    elastic_round(x, s, z, codes, 0.25)[2].backward()
    assert float(s.grad) == 0.75  # 3 codes away, times the gradient scale; the value itself is not scaled


@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), weights=st.booleans(), step=st.floats(1e-6, 1e3), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_zero_is_exact_and_every_code_is_in_range(bits, symmetric, weights, step, share, seed):
    codes = weight_codes(bits, symmetric) if weights else activation_codes(bits)
    z = (
        torch.tensor(float(round(codes.low + share * (codes.high - codes.low))))
        if not (weights and symmetric)
        else torch.zeros(())
    )
    s = torch.tensor(step)
    assert float(elastic_round(torch.zeros(1), s, z, codes, 1.0)) == 0.0
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * step * 2**bits
    q = integer_codes(x, s, z, codes)
    assert bool((q == q.round()).all()) and float(q.abs().max()) <= (127 if weights else 255)
    assert float((q + z).min()) >= codes.low and float((q + z).max()) <= codes.high
    if weights and symmetric:
        assert float(q.abs().max()) <= 2 ** (bits - 1) - 1


@given(bits=st.integers(2, 8), step=st.floats(1e-3, 1.0), zero=st.integers(0, 255), seed=st.integers(0, 99))
def test_it_is_torchs_own_fake_quantisation_bit_for_bit(bits, step, zero, seed):
    codes = activation_codes(bits)
    zero = min(zero, codes.high)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * step * 2 ** (bits - 1)
    s = torch.tensor(step)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(s), zero, 0, codes.high)
    assert torch.equal(elastic_round(x, s, torch.tensor(float(zero)), codes, 1.0), theirs)


def test_a_learned_step_stays_positive_and_a_negative_offset_stays_negative():
    x = torch.randn(1, 400, generator=torch.Generator().manual_seed(1)) + 0.4
    codes = [weight_codes(b, False) for b in (4, 8)]
    table = Table.fitted(x, (4, 8), codes, [None, None])
    table.ratio -= 3.0  # a training that went astray: no abs() turns it round
    assert float(table.at(4, codes[0])[0]) == pytest.approx(EPS)
    table.ratio.zero_()
    before = float(table.at(4, codes[0])[1])
    table.offset -= 0.1
    assert float(table.at(4, codes[0])[1]) == pytest.approx(before - 0.1 * 15)
    table.offset -= 9.0
    assert float(table.at(4, codes[0])[1]) == codes[0].low  # zero stays representable


def test_the_first_step_has_the_least_error_of_eighty():
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((2, 4000))
    codes = weight_codes(3, True)
    s, z = zero_anchored(x, codes, 0)
    assert z.tolist() == [0.0, 0.0]

    def error(row: int, step: float) -> float:
        got = integer_codes(x[row], torch.tensor(step), torch.tensor(0.0), codes) * step
        return float((got - x[row]).abs().pow(2.4).mean())

    for row in range(2):
        whole = float(x[row].abs().max()) / 3
        tried = [error(row, whole * (1 - 0.01 * i)) for i in range(80)]
        assert error(row, float(s[row])) == pytest.approx(min(tried), rel=1e-4) and min(tried) < 0.8 * tried[0]


def test_a_tensor_of_zeros_and_one_sided_ones_have_steps():
    codes = weight_codes(4, False)
    s, z = zero_anchored(torch.stack([torch.zeros(9), torch.rand(9) + 1, -torch.rand(9) - 1]), codes, None)
    assert bool((s > 0).all()) and bool((z >= -8).all()) and bool((z <= 7).all())
    assert float(z[1]) == -8 and float(z[2]) == 7


def test_values_that_cannot_be_negative_have_zero_point_0_and_stay_under_a_clamp():
    seen = torch.rand(3000) * 7
    quantiser = ValueQuantiser.fitted(seen, (2, 4, 8), (True, False), True, (0.0, 6.0))
    for bits in (2, 4, 8):
        for symmetric in (True, False):
            step, zero, levels = quantiser.scale(ActivationForm(bits, symmetric))
            assert zero == 0 and levels == 2**bits and step * (levels - 1) <= 6
    signed = ValueQuantiser.fitted(seen - 3, (4,), (True, False), False)
    assert signed.scale(ActivationForm(4, True))[1] == 8
    assert 0 < signed.scale(ActivationForm(4, False))[1] < 15


def test_per_channel_steps_are_each_channels_own():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 0.1, 0.01, 10.0]).reshape(4, 1, 1, 1)
    quantiser = WeightQuantiser.fitted(weight, (4, 8), (True, False), (True, False))
    codes, steps = quantiser.codes(weight, WeightForm(8, True, True))
    assert codes.dtype == torch.int8 and steps.shape == (4,) and float(steps[3] / steps[2]) > 100
    error = (codes * steps.reshape(4, 1, 1, 1) - weight).flatten(1).abs().amax(1)
    assert bool((error <= steps * 0.51 + 0.1 * weight.flatten(1).abs().amax(1)).all())
    _, shared = quantiser.codes(weight, WeightForm(4, False, False))
    assert shared.unique().numel() == 1
