"""Calibration pictures: what is skipped is counted and named, a useless set is refused."""

from __future__ import annotations

import export_nets
import numpy as np
import pytest
from PIL import Image

from export.pictures import load_pictures
from refold.errors import InputError
from refold.preprocess import Preprocess, Resize

EXACT = Preprocess(16, 16)


@pytest.fixture
def folder(tmp_path):
    for i, picture in enumerate(export_nets.pictures(6)):
        place = tmp_path / ("cat" if i % 2 else "dog")
        place.mkdir(exist_ok=True)
        Image.fromarray(picture).save(place / f"{i}.png")
    return tmp_path


def test_a_folder_of_classes(folder):
    got = load_pictures(folder, EXACT)
    assert got.images.shape == (6, 16, 16, 3) and got.labels is not None and sorted(got.labels) == [0, 0, 0, 1, 1, 1]
    assert list(load_pictures(folder, EXACT, classes=["dog", "cat"]).labels) == [1, 1, 1, 0, 0, 0]
    assert len(load_pictures(folder, EXACT, limit=3).images) == 3


def test_bad_pictures_are_skipped_and_named(folder):
    Image.new("L", (16, 16)).save(folder / "grey.png")
    Image.new("RGB", (20, 16)).save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    got = load_pictures(folder, EXACT)
    assert len(got.images) == 7 and len(got.skipped) == 2  # the grey one is converted
    assert got.labels is None  # but lies in no class's folder
    told = " ".join(got.skipped)
    assert "wide.png is 20x16, not 16x16" in told and "broken.jpg cannot be read" in told


def test_all_bad(tmp_path):
    with pytest.raises(InputError, match="holds no pictures"):
        load_pictures(tmp_path, EXACT)
    Image.new("RGB", (20, 16)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match=r"can be used: wide\.png is 20x16"):
        load_pictures(tmp_path, EXACT)
    with pytest.raises(InputError, match="no calibration set"):
        load_pictures(tmp_path / "nowhere", EXACT)


@pytest.mark.parametrize("same", [True, False])
def test_one_colour(tmp_path, same):
    images = np.full((8, 16, 16, 3), 90, np.uint8)
    if not same:
        images += np.arange(8, dtype=np.uint8).reshape(-1, 1, 1, 1) * 10
    np.savez(tmp_path / "c.npz", images=images)
    with pytest.raises(InputError, match="of one colour"):
        load_pictures(tmp_path / "c.npz", EXACT)


def test_npz(tmp_path):
    images = export_nets.pictures(5)
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(5))
    got = load_pictures(tmp_path / "a.npz", EXACT)
    assert np.array_equal(got.images, images) and list(got.labels) == [0, 1, 2, 3, 4]
    np.savez(tmp_path / "b.npz", images=images.astype(np.float32))
    with pytest.raises(InputError, match="uint8"):
        load_pictures(tmp_path / "b.npz", EXACT)
    np.savez(tmp_path / "c.npz", labels=np.arange(3))
    with pytest.raises(InputError, match="name it `images`"):
        load_pictures(tmp_path / "c.npz", EXACT)
    np.savez(tmp_path / "e.npz", images=images[:0])
    with pytest.raises(InputError, match="is empty"):
        load_pictures(tmp_path / "e.npz", EXACT)
    (tmp_path / "d.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match="cannot be read"):
        load_pictures(tmp_path / "d.npz", EXACT)
    with pytest.raises(InputError, match="not 8x8"):
        load_pictures(tmp_path / "a.npz", Preprocess(8, 8))


def test_resizing(folder):
    assert load_pictures(folder, Preprocess(8, 12, resize=Resize.STRETCH)).images.shape == (6, 12, 8, 3)
    crop = Preprocess(8, 8, resize=Resize.CENTRE_CROP, resize_short=10)
    Image.fromarray(export_nets.pictures(1, 32)[0][:20]).save(folder / "wide.png")
    assert load_pictures(folder, crop).images.shape == (7, 8, 8, 3)
