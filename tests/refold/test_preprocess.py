"""Preprocessing: one table, the same numbers on every side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refold import Preprocess
from refold.errors import BundleError, InputError, UsageError
from refold.preprocess import Resize
from refold.v1 import manifest_pb2 as pb


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1 / 255]))
def test_apply_is_the_formula(w, h, n, seed, scale):
    rng = np.random.default_rng(seed)
    mean, std = rng.uniform(0, 1, 3), rng.uniform(0.1, 1, 3)
    p = Preprocess(w, h, scale, tuple(mean), tuple(std))
    x = rng.integers(0, 256, (n, h, w, 3)).astype(np.uint8)
    y = p.apply(x)
    np.testing.assert_allclose(y, ((x * scale - mean) / std).transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert y.dtype == np.float32 and np.array_equal(p.apply(x[0])[0], y[0])


@pytest.mark.parametrize("shape", [(8, 9, 3), (8, 8, 1), (8, 8), (8, 8, 4), (2, 9, 8, 3)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(InputError, match="8x8 RGB") as e:
        Preprocess(8, 8).apply(np.zeros(shape, np.uint8))
    assert e.value.code == "wrong-size"
    with pytest.raises(InputError):
        Preprocess(8, 8).apply(np.zeros((8, 8, 3), np.float32))


def test_the_digest_changes_with_every_field_and_survives_the_wire():
    base = Preprocess(8, 8)
    others = [Preprocess(9, 8), Preprocess(8, 8, 1.0), Preprocess(8, 8, mean=(0.1, 0, 0)), Preprocess(8, 8, std=(1, 1, 2)),
              Preprocess(8, 8, resize=Resize.STRETCH), Preprocess(8, 8, resize_short=9)]  # fmt: skip
    digests = {p.digest for p in [base, *others]}
    assert len(digests) == 7 and all(Preprocess.from_pb(p.to_pb()).digest == p.digest for p in others)


def test_nonsense_is_refused():
    for make in (lambda: Preprocess(0, 8), lambda: Preprocess(8, 8, std=(1, 0, 1)), lambda: Preprocess(8, 8, mean=(1, 2))):
        with pytest.raises(UsageError):
            make()
    with pytest.raises(BundleError):
        Preprocess.from_pb(pb.Preprocess(width=8, height=8))
