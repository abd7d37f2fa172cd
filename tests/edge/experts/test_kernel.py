"""Both kernels against the oracle, refold.experts.dequantise: bits, groups, ragged columns, batches, bad input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.experts import kernel
from edge.experts.kernel.native import Native, UnavailableError
from edge.experts.kernel.portable import PORTABLE, activated, as_int8, weights
from refold.errors import UsageError
from refold.experts import Matrix, decode, dequantise, encode, quantise
from refold.experts.records import CENTRE

F64 = NDArray[np.float64]


@cache
def _native() -> kernel.Kernel:
    return Native()


def native() -> kernel.Kernel:
    try:
        return _native()
    except UnavailableError as e:
        pytest.skip(f"no native kernel: {e}")


KERNELS: dict[str, Callable[[], kernel.Kernel]] = {"native": native, "torch": lambda: PORTABLE}
both = pytest.mark.parametrize("which", KERNELS)
few = settings(max_examples=25, deadline=None)


@st.composite
def products(draw: st.DrawFn) -> tuple[Matrix, torch.Tensor]:
    """A matrix and inputs of very different sizes, some of them zero."""
    bits, group = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([32, 64, 96, 128, 256]))
    rows, columns, n = draw(st.integers(1, 9)), draw(st.integers(1, 600)), draw(st.integers(1, 21))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal((rows, columns), np.float32) * np.float32(10.0 ** draw(st.integers(-3, 1)))
    x = rng.standard_normal((n, columns), np.float32) * np.float32(10) ** rng.integers(-4, 3, (n, 1)).astype(np.float32)
    x[rng.random(x.shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    return quantise(weight, bits, group), torch.from_numpy(x)


def oracle(m: Matrix, x: torch.Tensor) -> tuple[F64, F64]:
    """The product in float64 of the exact weights and the int8 input, and the size of what a kernel may round: it may sum
    code and centre apart, so a weight of zero is no term of zero."""
    q = as_int8(x, m.group)[:, : m.shape[1]].numpy().astype(np.float64)
    w = dequantise(m).astype(np.float64)
    centres = CENTRE[m.bits] * m.scales.astype(np.float64).repeat(m.group, axis=1)[:, : m.shape[1]]
    return q @ w.T, np.abs(q) @ (np.abs(w) + 2 * centres).T


@both
@few
@example((quantise(np.float32([[2, 0]]), 4, 32), torch.tensor([[0, 6.071e-3]])))  # all of it is what rounds
@given(products())
def test_product_is_the_oracles_to_float32_rounding(which: str, product: tuple[Matrix, torch.Tensor]) -> None:
    m, x = product
    wanted, size = oracle(m, x)
    apart = np.abs(KERNELS[which]().linear(m, x).numpy() - wanted)
    assert (apart <= 1e-6 * size + 1e-30).all()


def test_int8_input_is_divided_as_the_native_kernel_divides() -> None:
    """To torch a number over a tensor is that number times 1 / tensor, whose last bit is another one time in four: values
    on the edge between two codes tell."""
    most = np.random.default_rng(0).uniform(0.1, 10, (2_000, 1)).astype(np.float32)
    inverse = np.float32(127) / most
    edges = (np.arange(31, dtype=np.float32) + np.float32(0.5)) / inverse
    x = np.concatenate([most, edges], 1)
    assert np.array_equal(as_int8(torch.from_numpy(x), 32).numpy(), np.rint(x * inverse) * (most / np.float32(127)))


@few
@given(products())
def test_int8_input_is_within_half_a_step_of_the_float_input(product: tuple[Matrix, torch.Tensor]) -> None:
    m, x = product
    q = as_int8(x, m.group)
    wide = torch.nn.functional.pad(x, (0, q.shape[1] - x.shape[1])).reshape(len(x), -1, 32)
    step = wide.abs().amax(2, keepdim=True) / 127
    assert bool(((q.reshape(wide.shape) - wide).abs() <= 0.5001 * step + 1e-30).all())


@both
@few
@given(products())
def test_a_token_alone_yields_the_same_bits_as_in_a_crowd(which: str, product: tuple[Matrix, torch.Tensor]) -> None:
    m, x = product
    chosen = KERNELS[which]()
    together = chosen.linear(m, x)
    assert torch.equal(together, torch.cat([chosen.linear(m, row[None]) for row in x]))
    assert torch.equal(together.flip(0), chosen.linear(m, x.flip(0)))


@few
@given(products())
def test_portable_weights_are_the_oracles(product: tuple[Matrix, torch.Tensor]) -> None:
    m, _ = product
    assert np.array_equal(weights(m).numpy()[:, : m.shape[1]], dequantise(m))


def an_expert(hidden: int, inner: int, gated: bool, bits: int) -> tuple[Matrix, ...]:
    """Through its record, so that scales and codes lie where a pager has them."""
    rng = np.random.default_rng(7)
    shapes = ((2 if gated else 1) * inner, hidden), (hidden, inner)
    made = [quantise(rng.standard_normal(s, np.float32) * np.float32(0.1), bits, 64) for s in shapes]
    return decode(encode(3, 5, made), shapes, 3, 5)


@both
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "mish"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_expert_is_its_formula(which: str, gated: bool, activation: str, bits: int) -> None:
    pytest.importorskip("transformers")
    hidden, inner = 160, 72
    first, second = an_expert(hidden, inner, gated, bits)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((37, hidden), np.float32))
    h = torch.from_numpy(oracle(first, x)[0]).float()
    wanted = torch.from_numpy(oracle(second, activated(h, gated, activation))[0]).float()
    got = KERNELS[which]().expert((first, second), x, gated, activation)
    # A value of h at the edge of two int8 steps may round to the other one: a step of 1/127 of one of 72 terms.
    assert got.shape == (37, hidden) and got.dtype == torch.float32
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 2e-3
    assert float((got - wanted).abs().mean() / wanted.abs().mean()) < 2e-4
    assert torch.equal(got, torch.cat([KERNELS[which]().expert((first, second), r[None], gated, activation) for r in x]))


@st.composite
def halves(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A 16-bit matrix and inputs."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    rows, columns, n = draw(st.integers(1, 9)), draw(st.integers(1, 200)), draw(st.integers(0, 21))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = torch.from_numpy(rng.standard_normal((rows, columns), np.float32) * np.float32(10.0 ** draw(st.integers(-6, 2))))
    return weight.to(dtype), torch.from_numpy(rng.standard_normal((n, columns), np.float32))


@both
@few
@given(halves())
def test_16_bit_weights_are_multiplied_exactly_and_each_token_alone(
    which: str, product: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight, x = product
    chosen = KERNELS[which]()
    got, wide = chosen.half(weight, x), weight.double()
    assert got.shape == (len(x), len(weight)) and got.dtype == torch.float32
    assert bool(((got - x.double() @ wide.T).abs() <= 2e-6 * (x.double().abs() @ wide.abs().T) + 1e-30).all())
    if which == "native":
        assert all(torch.equal(chosen.half(weight, row[None])[0], own) for row, own in zip(x, got, strict=True))


@both
@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.zeros(8, dtype=torch.float16), torch.zeros(8, 4).half().T])
def test_what_is_no_16_bit_matrix_is_refused(which: str, weight: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="16-bit matrix is float16 or bfloat16"):
        KERNELS[which]().half(weight, torch.zeros(1, 8))


def test_both_kernels_agree_on_an_expert() -> None:
    for bits in (2, 4, 8):
        matrices = an_expert(256, 192, True, bits)
        x = torch.from_numpy(np.random.default_rng(2).standard_normal((8, 256), np.float32))
        ours, theirs = native().expert(matrices, x, True, "silu"), PORTABLE.expert(matrices, x, True, "silu")
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-3


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(which: str, bad: float) -> None:
    m = quantise(np.ones((3, 128), np.float32), 4, 64)
    x = torch.ones(5, 128)
    x[2, 40] = bad
    out = KERNELS[which]().linear(m, x)
    assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


@both
def test_no_tokens_yield_none(which: str) -> None:
    matrices = an_expert(64, 32, True, 4)
    assert KERNELS[which]().expert(matrices, torch.zeros(0, 64), True, "silu").shape == (0, 64)


@both
def test_input_with_gaps_or_a_gradient_is_read_right(which: str) -> None:
    m = quantise(np.random.default_rng(0).standard_normal((4, 64), np.float32), 4, 64)
    wide = torch.randn(5, 128, requires_grad=True)
    assert torch.equal(KERNELS[which]().linear(m, wide[:, ::2]), KERNELS[which]().linear(m, wide[:, ::2].detach().clone()))


def _broken(m: Matrix) -> Sequence[Matrix]:
    return [
        Matrix(m.shape, m.bits, m.group, m.scales, m.codes[:-1]),
        Matrix(m.shape, m.bits, m.group, m.scales[:, :-1], m.codes),
        Matrix((m.shape[0], m.shape[1] * 2), m.bits, m.group, m.scales, m.codes),
        Matrix(m.shape, 3, m.group, m.scales, m.codes),
        Matrix(m.shape, m.bits, 48, m.scales, m.codes),
        Matrix(m.shape, m.bits, m.group, m.scales, np.repeat(m.codes, 2, 1)[:, ::2]),
    ]


@both
def test_bad_input_is_a_sentence_not_a_crash(which: str) -> None:
    chosen, m = KERNELS[which](), quantise(np.ones((4, 128), np.float32), 4, 64)
    for broken in _broken(m):
        with pytest.raises(UsageError):
            chosen.linear(broken, torch.ones(1, broken.shape[1]))
    for x in (torch.ones(1, 127), torch.ones(128), torch.ones(1, 128, dtype=torch.float16), torch.ones(1, 128, device="meta")):
        with pytest.raises(UsageError):
            chosen.linear(m, x)
    matrices = an_expert(64, 32, True, 4)
    for wrong in (matrices[:1], matrices[::-1], (matrices[0], matrices[0])):
        with pytest.raises(UsageError):
            chosen.expert(wrong, torch.ones(1, 64), True, "silu")
    with pytest.raises(UsageError):
        chosen.expert(matrices, torch.ones(1, 64), False, "silu")
    with pytest.raises(UsageError, match="no activation 'silly'"):
        chosen.expert(matrices, torch.ones(1, 64), True, "silly")
