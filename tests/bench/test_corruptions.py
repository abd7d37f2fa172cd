from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from bench.corrupt import NAMES, RECIPES, corrupt
from bench.corrupt.pixels import bilinear, reflect, unit, wand_motion_blur, zoom_matrix
from bench.corrupt.streams import stream
from bench.corrupt.weather import FROST, frost_texture
from refold.errors import InputError, UsageError


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Coloured clouds, dense in detail like photographs: every corruption has something to spoil."""
    rng = np.random.default_rng(7)
    cycles = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None, :])
    spectrum = np.fft.rfft2(rng.normal(size=(24, 3, 32, 32))) / np.maximum(cycles, 1 / 32)
    clouds = np.fft.irfft2(spectrum, s=(32, 32)).transpose(0, 2, 3, 1)
    return np.clip(120 + 50 * clouds / clouds.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_same_arguments_same_bytes(name: str, pictures: np.ndarray) -> None:
    before = pictures.copy()
    first = corrupt(name, 3, pictures, seed=5)
    assert first.dtype == np.uint8 and first.shape == pictures.shape
    assert np.array_equal(first, corrupt(name, 3, pictures, seed=5))
    assert np.array_equal(pictures, before)
    assert not np.array_equal(first, pictures)


@pytest.mark.parametrize("name", NAMES)
def test_drawn_corruptions_follow_the_seed(name: str, pictures: np.ndarray) -> None:
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    same = np.array_equal(corrupt(name, 5, pictures, 1), corrupt(name, 5, pictures, 2))
    assert same == (name in fixed)


@pytest.mark.parametrize("name", NAMES)
def test_severity_five_is_farther_than_severity_one(name: str, pictures: np.ndarray) -> None:
    distance = [np.abs(corrupt(name, s, pictures).astype(int) - pictures).mean() for s in (1, 2, 3, 4, 5)]
    # The others' parameters trade one effect for another between severities (shear for displacement, ice for darkness).
    if name not in ("elastic_transform", "glass_blur", "motion_blur", "snow", "frost"):
        assert all(a <= b + 0.05 for a, b in itertools.pairwise(distance)), distance
    if name != "elastic_transform":
        assert distance[4] > distance[0]


def test_clean_is_a_copy_and_a_longer_stream_starts_the_same(pictures: np.ndarray) -> None:
    copy = corrupt("clean", 1, pictures)
    assert np.array_equal(copy, pictures) and copy is not pictures
    many = np.tile(pictures, (22, 1, 1, 1))  # 528: two full chunks and a part
    assert np.array_equal(corrupt("shot_noise", 5, many)[:500], corrupt("shot_noise", 5, many[:510])[:500])


@pytest.mark.parametrize(
    ("name", "severity", "images", "error"),
    [
        ("rain", 5, np.zeros((1, 32, 32, 3), np.uint8), UsageError),
        ("fog", 6, np.zeros((1, 32, 32, 3), np.uint8), UsageError),
        ("fog", 5, np.zeros((1, 30, 30, 3), np.uint8), InputError),
        ("contrast", 5, np.zeros((1, 32, 32, 3), np.float32), InputError),
        ("contrast", 5, np.zeros((1, 32, 16, 3), np.uint8), InputError),
        ("contrast", 5, np.zeros((32, 32, 3), np.uint8), InputError),
    ],
)
def test_bad_input_is_refused(name: str, severity: int, images: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        corrupt(name, severity, images)


def test_no_pictures_is_no_pictures() -> None:
    assert corrupt("fog", 5, np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 32, 32, 3)


def test_noise_has_the_stated_size() -> None:
    grey = np.full((60, 32, 32, 3), 128, np.uint8)
    assert np.std(corrupt("gaussian_noise", 5, grey) / 255) == pytest.approx(0.10, abs=0.002)
    assert np.std(corrupt("shot_noise", 5, grey) / 255) == pytest.approx(np.sqrt(128 / 255 / 50), abs=0.002)
    salted = corrupt("impulse_noise", 5, grey)
    assert (salted == 0).mean() == pytest.approx(0.035, abs=0.003)
    assert (salted == 255).mean() == pytest.approx(0.035, abs=0.003)


def test_contrast_and_brightness_are_what_they_say(pictures: np.ndarray) -> None:
    flat = corrupt("contrast", 5, pictures)
    assert flat.std((1, 2)) == pytest.approx(0.15 * pictures.std((1, 2)), abs=0.6)
    dark = np.full((1, 32, 32, 3), 40, np.uint8)
    assert corrupt("brightness", 5, dark) == pytest.approx(40 + 0.3 * 255, abs=1)


def test_geometry_helpers() -> None:
    x = np.arange(16, dtype=float).reshape(1, 4, 4, 1)
    rows, columns = np.mgrid[:4, :4].astype(float)
    assert np.array_equal(bilinear(x, rows[None], columns[None]), x)
    assert bilinear(x, rows[None] + 0.5, columns[None])[0, 0, 0, 0] == 2
    assert reflect(np.array([-2, -1, 0, 3, 4, 5]), 4).tolist() == [2, 1, 0, 3, 2, 1]
    assert zoom_matrix(32, 1.0) == pytest.approx(np.eye(32))
    assert zoom_matrix(32, 1.25).sum(1) == pytest.approx(np.ones(32))
    dot = np.zeros((2, 9, 9, 1))
    dot[:, 4, 4] = 1
    smeared = wand_motion_blur(dot, 2, 1.0, np.array([0.0, -90.0]))[..., 0]
    assert np.flatnonzero(smeared[0].any(1)).tolist() == [4]  # 0 degrees: along the row
    assert np.flatnonzero(smeared[1].any(0)).tolist() == [4]  # a quarter turn: along the column
    assert unit(np.array([255], np.uint8))[0] == 1


def test_frost_kinds_keep_their_colour() -> None:
    assert sum(k.share for k in FROST) == pytest.approx(1)
    ice = frost_texture(300, 32, np.random.default_rng(0))
    assert ice.shape == (300, 32, 32, 3) and ice.min() >= 0 and ice.max() <= 255
    assert ice.mean((0, 1, 2)) == pytest.approx([139, 162, 174], abs=8)


@pytest.fixture(scope="module")
def reference(data_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """500 clean test pictures, and what the authors' code made of them at severity 5: (15, 500, 32, 32, 3)."""
    from demo.images import load_u8

    blocks = load_u8(data_folder / "cifar10c_s5_15x500.u8.xz").reshape(15, 500, 32, 32, 3)
    return load_u8(data_folder / "cifar10_test.u8.xz")[:500], blocks


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_reference_block(name: str, reference: tuple[np.ndarray, np.ndarray]) -> None:
    """Colours, spread and sharpness within sampling error."""
    clean, block = reference[0], reference[1][NAMES.index(name)]
    made = corrupt(name, 5, clean, seed=1)
    assert made.mean((0, 1, 2)) == pytest.approx(block.mean((0, 1, 2)), abs=3.0 if name == "frost" else 1.6)
    assert made.std((0, 1, 2)) == pytest.approx(block.std((0, 1, 2)), abs=1.0)
    sharpness = [np.abs(np.diff(a.astype(float), axis=2)).mean() for a in (made, block)]
    assert sharpness[0] == pytest.approx(sharpness[1], rel=0.03)
    if name in ("zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"):  # nothing drawn: the same pictures
        assert np.abs(made.astype(int) - block).mean() < 0.02


def test_streams_are_kept_and_published_files_preferred(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("REFOLD_CIFAR10C", raising=False)
    made = stream("contrast", 40, seed=3)
    assert len(made) == 40 and len(set(made.index.tolist())) == 40 and not made.published
    (kept,) = (tmp_path / "cache" / "refold" / "streams").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])  # a run killed while writing
    assert np.array_equal(stream("contrast", 40, seed=3).images, made.images)
    assert not np.array_equal(stream("fog", 40, seed=3).index, made.index)

    rows = np.zeros((50_000, 32, 32, 3), np.uint8)
    rows[40_000 + made.index, 0, 0, 0] = 1 + np.arange(40)
    np.save(tmp_path / "contrast.npy", rows)
    monkeypatch.setenv("REFOLD_CIFAR10C", str(tmp_path))
    published = stream("contrast", 40, seed=3)
    assert published.published and published.images[:, 0, 0, 0].tolist() == list(range(1, 41))
    np.save(tmp_path / "fog.npy", rows[:10])
    with pytest.raises(InputError):
        stream("fog", 40)


def test_a_stream_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count, severity in (("rain", 10, 5), ("fog", 0, 5), ("fog", 10_001, 5), ("fog", 10, 0)):
        with pytest.raises(UsageError):
            stream(name, count, severity=severity)
    assert all(len(p) == 5 for _, p in RECIPES.values())
