"""When local statistics are served: the first norms see a shift, or the images' mirrored views agree more behind them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.adapt.support import GAIN, LEAST, PLAIN, agreement, agreement_gain, supported
from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import measure_of
from refold.statistics import StatisticsModel


def test_agreement_is_that_two_draws_are_the_same_class():
    sure, other = np.array([[50.0, 0, 0]], np.float32), np.array([[0, 50.0, 0]], np.float32)
    even = np.zeros((1, 3), np.float32)
    assert agreement(sure, sure) == pytest.approx(1)
    assert agreement(sure, other) == pytest.approx(0, abs=1e-6)
    assert agreement(sure, even) == agreement(even, even) == pytest.approx(1 / 3)


@given(shift=st.floats(0, 1), gain=st.floats(-1, 1))
def test_little_shift_is_never_served_and_a_plain_one_always(shift, gain):
    served = supported(shift, gain)
    assert served or shift < PLAIN
    assert not served or shift >= LEAST
    assert served == (shift >= PLAIN or (shift >= LEAST and gain >= GAIN))


def test_the_gain_is_that_of_the_engines_that_are_served(bundle, factory: EngineFactory):
    """Behind the very engines: what a device would answer."""
    from small_nets import images, shifted

    pictures = list(images(24, bundle.preprocess.height, seed=3))
    states = ServingState(), ServingState(shifted(bundle.norms, 1))
    model = StatisticsModel.of(bundle)
    measure = measure_of(factory, model, 64)
    assert measure is not None
    found = agreement_gain(measure, model, *states, pictures)

    def seen(state: ServingState) -> float:
        engine = factory.build(state)
        views = (np.stack(pictures), np.ascontiguousarray(np.stack(pictures)[:, :, ::-1]))
        return agreement(*(engine.run(bundle.preprocess.apply(v)) for v in views))

    assert found == pytest.approx(seen(states[1]) - seen(states[0]), abs=0.01)
    assert agreement_gain(measure, model, states[1], states[1], pictures) == 0
