"""The demo's weather: shapes, seeds, limits, and the same statistics as the benchmark's own blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.images import load_u8
from demo.weather import WEATHERS, Climate, plasma, weather
from refold.errors import UsageError


def _pictures(count: int = 8, side: int = 32) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)


@given(st.sampled_from(WEATHERS), st.integers(1, 5), st.sampled_from([1, 2, 16, 32]), st.integers(0, 2**32))
def test_any_weather_gives_pictures_of_the_same_shape_and_a_seed_repeats_it(
    name: str, severity: int, side: int, seed: int
) -> None:
    images = _pictures(2, side)
    once, again = (weather(name, images, np.random.default_rng(seed), Climate.of_severity(severity)) for _ in range(2))
    assert once.shape == images.shape and once.dtype == np.uint8 and np.array_equal(once, again)


def test_clean_changes_nothing_and_the_others_do() -> None:
    images = _pictures()
    rng = np.random.default_rng(0)
    assert np.array_equal(weather("clean", images, rng), images)
    assert not np.array_equal(weather("fog", images, rng), images)
    assert not np.array_equal(weather("noise", images, rng), images)


def test_black_pictures_survive_fog() -> None:
    black = np.zeros((2, 32, 32, 3), np.uint8)
    assert weather("fog", black, np.random.default_rng(0)).max() == 0


def test_plasma_fills_the_range_and_differs_per_picture() -> None:
    clouds = plasma(4, 32, 1.75, np.random.default_rng(0))
    assert np.allclose(clouds.min((1, 2)), 0) and np.allclose(clouds.max((1, 2)), 1)
    assert not np.array_equal(clouds[0], clouds[1])


def test_unknown_weather_is_named() -> None:
    with pytest.raises(UsageError, match="hail"):
        weather("hail", _pictures(), np.random.default_rng(0))
    with pytest.raises(UsageError, match="severity 6"):
        Climate.of_severity(6)


@pytest.mark.data
@pytest.mark.parametrize("name, block", [("fog", 9), ("noise", 0)])
def test_statistics_are_those_of_the_benchmark(data_folder: Path, name: str, block: int) -> None:
    clean = load_u8(data_folder / "cifar10_test.u8.xz")[:500]
    published = load_u8(data_folder / "cifar10c_s5_15x500.u8.xz")[block * 500 : block * 500 + 500]
    ours = weather(name, clean, np.random.default_rng(3))
    assert np.allclose(ours.mean((0, 1, 2)), published.mean((0, 1, 2)), atol=1.0)
    assert np.isclose(ours.std((1, 2)).mean(), published.std((1, 2)).mean(), rtol=0.03)
