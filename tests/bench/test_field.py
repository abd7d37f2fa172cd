"""The field benchmark's streams, networks and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from bench.field.forge_nets import forge_mobilenetv2, forge_resnet20
from bench.field.report import claims, worst_window
from bench.field.streams import ORDERS, STREAMS, Part, frames_of, streams_for
from demo.images import data_folder
from demo.models import load_npz

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
LABELS = np.repeat(np.arange(10), 40).astype(np.int64)


def test_the_worst_window_by_hand():
    frozen = np.ones(10, bool)
    adapted = np.array([1, 1, 0, 0, 1, 1, 1, 1, 1, 1], bool)
    assert worst_window(adapted, frozen, 4) == -50.0
    assert worst_window(adapted, frozen, 500) == -20.0  # fewer frames than the window: all of them
    assert worst_window(frozen, adapted, 2) == 0.0


@pytest.mark.parametrize(
    "name", [n for n, parts in STREAMS.items() if {p.corruption for p in parts} <= {"clean", "dark", "black"}]
)
def test_streams_have_their_frames_and_repeat_themselves(name):
    parts = STREAMS[name]
    a, b = (frames_of(parts, IMAGES, LABELS, 5) for _ in range(2))
    assert len(a.images) == len(a.labels) == sum(p.count for p in parts)
    np.testing.assert_array_equal(a.images, b.images)
    assert (frames_of(parts, IMAGES, LABELS, 6).images != a.images).any()


def test_orders_are_what_they_are_called():
    def of(name: str, count: int = 300) -> np.ndarray:
        return LABELS[ORDERS[name](LABELS, np.random.default_rng(1), count)]

    assert (np.diff(of("sorted")) >= 0).all()
    assert set(of("ships")) == {8} and set(of("cats")) == {3}
    assert 0.68 < (of("70 % of one class", 1000) == 0).mean() < 0.78
    runs = {name: float((np.diff(of(name)) == 0).mean()) for name in ("shuffled", "dirichlet 0.1", "dirichlet 0.01")}
    assert runs["shuffled"] < 0.2 < runs["dirichlet 0.1"] < runs["dirichlet 0.01"]
    assert len({int(i) for i in ORDERS["still"](LABELS, np.random.default_rng(1), 50)}) == 1


def test_dark_and_black_are_darker():
    dark, black = (frames_of((Part(20, k),), IMAGES, LABELS, 0).images for k in ("dark", "black"))
    assert dark.max() <= 85 and black.max() == 0


def test_photographs_have_streams_that_their_size_allows():
    for parts in streams_for(True).values():
        assert not {p.corruption for p in parts} & {"fog", "frost", "snow"}


def test_claims_name_the_worst():
    rows = [
        {"network": "n", "stream": "a", "difference": 3.0, "worst 500": -4.0},
        {"network": "n", "stream": "b", "difference": -2.0, "worst 500": -2.0},
    ]
    stream, window = claims(rows)
    assert stream.value == -2.0 and "(b)" in stream.text and not stream.holds
    assert window.value == -4.0 and "(a)" in window.text and not window.holds


@pytest.mark.skipif(data_folder() is None, reason="REFOLD_DATA is not set")
@pytest.mark.parametrize(
    ("make", "name", "parameters"), [(forge_resnet20, "resnet20", 272_474), (forge_mobilenetv2, "mobilenetv2", 590_410)]
)
def test_forges_weights_fit(make, name, parameters):
    folder = data_folder()
    assert folder is not None
    net = load_npz(make(), folder / f"forge_{name}_cifar10.npz")
    assert sum(p.numel() for p in net.parameters()) == parameters
