"""When local statistics are served: the first norms see a shift, or the images' mirrored views agree more behind them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.adapt.support import DIVERSE, GAIN, LEAST, LOSS, PLAIN, Change, agreement, change_of_answers, diversity, supported
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


def test_diversity_is_the_entropy_of_the_mean_answer():
    two = np.array([[50.0, 0, 0], [0, 50.0, 0]], np.float32)
    assert diversity(two) == pytest.approx(np.log(2)) and diversity(two[:1]) == pytest.approx(0, abs=1e-6)


@given(shift=st.floats(0, 1), gain=st.floats(-1, 1), more=st.floats(-4, 4))
def test_little_shift_is_never_served_and_a_plain_one_unless_answers_speak_against_it(shift, gain, more):
    served = supported(shift, Change(gain, more))
    assert not served or shift >= LEAST
    if shift >= PLAIN:
        assert served == (gain >= -LOSS or more >= DIVERSE)  # a model that answers one class agrees with itself
    elif shift >= LEAST:
        assert served == (gain >= GAIN)


def test_earlier_images_count_by_their_share():
    found = Change(0.1, 1.0).beside(Change(-0.1, 0.0), 0.75)
    assert found.agreement == pytest.approx(-0.05) and found.diversity == pytest.approx(0.25)


def test_the_change_is_that_of_the_engines_that_are_served(bundle, factory: EngineFactory):
    """Behind the very engines: what a device would answer."""
    from small_nets import images, shifted

    pictures = list(images(24, bundle.preprocess.height, seed=3))
    states = ServingState(), ServingState(shifted(bundle.norms, 1))
    model = StatisticsModel.of(bundle)
    measure = measure_of(factory, model, 64)
    assert measure is not None
    found = change_of_answers(measure, model, *states, pictures)

    def seen(state: ServingState) -> tuple[float, float]:
        engine = factory.build(state)
        views = (np.stack(pictures), np.ascontiguousarray(np.stack(pictures)[:, :, ::-1]))
        answers = [engine.run(bundle.preprocess.apply(v)) for v in views]
        return agreement(*answers), diversity(answers[0])

    before, after = seen(states[0]), seen(states[1])
    assert found.agreement == pytest.approx(after[0] - before[0], abs=0.01)
    assert found.diversity == pytest.approx(after[1] - before[1], abs=0.01)
    assert change_of_answers(measure, model, states[1], states[1], pictures) == Change()
