"""Orders of the corrections' benchmark, and that its shortcut serves what a device would."""

from __future__ import annotations

import numpy as np
import pytest

from bench.corrections import always, second_looks, switched
from bench.orders import ORDERS, alternating, by_class, order, skewed
from edge.adaptation.corrections import CORRECTIONS, make_corrector

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))


@pytest.mark.parametrize("name", ORDERS)
def test_every_frame_comes_at_most_once_and_a_seed_repeats_itself(name: str) -> None:
    got = order(name, LABELS, np.random.default_rng(1))
    assert len(set(got.tolist())) == len(got) > 50 and got.max() < len(LABELS)
    np.testing.assert_array_equal(got, order(name, LABELS, np.random.default_rng(1)))


def test_what_the_names_say() -> None:
    rng = np.random.default_rng(2)
    assert (np.diff(LABELS[by_class(LABELS, rng)]) != 0).sum() == 9
    runs = LABELS[alternating(LABELS, rng)].reshape(-1, 20)
    assert (runs == runs[:, :1]).all() and (runs[1:, 0] != runs[:-1, 0]).all() and len(runs) >= 25
    share = np.bincount(LABELS[skewed(LABELS, rng, 0.7)]).max() / len(skewed(LABELS, rng, 0.7))
    assert share == pytest.approx(0.7, abs=0.01)
    narrow, wide = (
        np.mean([len(set(LABELS[part].tolist())) for part in np.array_split(order(f"dirichlet {d}", LABELS, rng), 20)])
        for d in (0.01, 0.1)
    )
    assert narrow < wide < 9


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_tables_switched_answers_are_the_devices(name: str) -> None:
    rng = np.random.default_rng(3)
    labels = np.concatenate([LABELS[by_class(LABELS, rng)], LABELS[:200]])
    logits = (rng.normal(0, 1, (len(labels), 10)) + 2.5 * np.eye(10)[labels]).astype(np.float32)
    on, corrected = switched(logits), always(name, logits)
    corrector = make_corrector(name, 10)
    assert corrector is not None and 100 < on.sum() < len(on)
    for i, row in enumerate(logits):
        answer = corrector.answer(row, "")
        assert (answer is not None) == on[i]
        assert answer is None or answer.argmax() == corrected[i]


def test_second_looks_are_counted() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (500, 10)).astype(np.float32)
    classes, ratio = second_looks(logits, logits)
    np.testing.assert_array_equal(classes, logits.argmax(1))
    assert 1.1 < ratio <= 1.2
