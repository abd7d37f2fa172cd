"""Statistics stay inside the trust region, whatever was observed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from statistics_of import table

from refold import NormSite, NormState
from refold.norms import check_state
from refold.statistics import within_trust


@given(st.integers(0, 2**16), st.floats(1e-12, 1e12))
def test_variances_beyond_reason_are_brought_back(seed: int, size: float) -> None:
    norms = table(seed)
    for site in norms.norms:
        state = site.exported.with_statistics(site.exported.mean, np.full(site.channels, size, np.float32))
        check_state(site, within_trust(site, state, norms.trust_ratio), trust_ratio=norms.trust_ratio)


@given(st.integers(0, 2**16), st.floats(0.7, 1.4))
def test_what_is_admitted_is_left_as_it_is(seed: int, factor: float) -> None:
    for site in table(seed).norms:
        state = site.exported.with_statistics(site.exported.mean + 1, site.exported.variance * np.float32(factor))
        assert within_trust(site, state, 8.0) == state


def test_a_dead_channel_keeps_its_exported_variance() -> None:
    gamma = np.array([1.0, 1e-12, 0.0], np.float32)
    dead = NormSite.folded(
        "a", weight_scale=np.full(3, 1e-3), layer_bias=np.zeros(3),
        exported=NormState(gamma, np.ones(3), np.zeros(3), np.ones(3)), input_tensor="input", input_scale=0.03,
    )  # fmt: skip
    state = within_trust(dead, dead.exported.with_statistics(dead.exported.mean, np.full(3, 50.0, np.float32)), 8.0)
    assert state.variance[1] == 1.0
    check_state(dead, state)
