"""Images: every mode, orientation and kind of file by its rule; the same bytes for calibration, device and service."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from cloud.pictures import decode_picture
from edge.encode import encode_image
from edge.sources import open_source
from export.pictures import load_pictures
from refold.errors import InputError
from refold.imaging import SUFFIXES, read_image
from refold.imaging.read import FORMATS, decoded
from refold.preprocess import Preprocess, Resize

WIDTH, HEIGHT = 12, 8
EXACT = Preprocess(WIDTH, HEIGHT)
RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY, KEY = RGB[:, :, 0], RGB[2, 3]
ALPHA = np.where(RNG.random((HEIGHT, WIDTH)) < 0.3, 0, RNG.integers(0, 256, (HEIGHT, WIDTH))).astype(np.uint8)
DEEP = RNG.integers(0, 65_536, (HEIGHT, WIDTH), dtype=np.uint16)
DEEP[0, :4] = 0, 1, 65_534, 65_535

Make = Callable[[Path], Any]


def grey_keyed() -> np.ndarray:
    return np.where(np.equal(GREY, KEY[0]), 255, GREY).astype(np.uint8)


SECOND = {"save_all": True, "append_images": [Image.fromarray(RGB[::-1])]}


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, 2)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Exact: round(c * a/255 + 255 * (1 - a/255)), halves up."""
    a = alpha.astype(np.int64)[:, :, None]
    return ((2 * (colour.astype(np.int64) * a + 255 * (255 - a)) + 255) // 510).astype(np.uint8)


def scaled(values: np.ndarray, largest: int) -> np.ndarray:
    return np.floor(values.astype(np.float64) * 255 / largest + 0.5).astype(np.uint8)


def cmyk(values: np.ndarray) -> np.ndarray:
    c, k = 255.0 - values[:, :, :3], 255.0 - values[:, :, 3:].astype(np.float64)
    return c * k / 255


PALETTE = Image.fromarray(RGB).quantize(16)
LOOKED_UP = np.asarray(PALETTE.convert("RGB"))
RGBA, LA = np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])
BITS = Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8)).convert("1")
CMYK = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
TRANSPARENT = 3  # index of the palette that is transparent


def palette_over_white() -> np.ndarray:
    index, colours = np.asarray(PALETTE), np.asarray(PALETTE.getpalette(), np.uint8).reshape(-1, 3)
    return np.where(index[:, :, None] == TRANSPARENT, 255, colours[index]).astype(np.uint8)


def keyed() -> np.ndarray:
    return np.where((RGB == KEY).all(2)[:, :, None], 255, RGB).astype(np.uint8)


CASES: dict[str, tuple[str, Make, np.ndarray]] = {
    "rgb png": ("x.png", lambda p: Image.fromarray(RGB).save(p), RGB),
    "rgb bmp": ("x.bmp", lambda p: Image.fromarray(RGB).save(p), RGB),
    "rgb ppm": ("x.ppm", lambda p: Image.fromarray(RGB).save(p), RGB),
    "rgb tiff": ("x.tif", lambda p: Image.fromarray(RGB).save(p), RGB),
    "rgb webp": ("x.webp", lambda p: Image.fromarray(RGB).save(p, lossless=True), RGB),
    "grey png": ("x.png", lambda p: Image.fromarray(GREY).save(p), three(GREY)),
    "grey pgm": ("x.pgm", lambda p: Image.fromarray(GREY).save(p), three(GREY)),
    "bits png": ("x.png", BITS.save, three(np.asarray(BITS.convert("L")))),
    "bits tiff": ("x.tiff", BITS.save, three(np.asarray(BITS.convert("L")))),
    "palette png": ("x.png", PALETTE.save, LOOKED_UP),
    "palette gif": ("x.gif", PALETTE.save, LOOKED_UP),
    "palette bmp": ("x.bmp", PALETTE.save, LOOKED_UP),
    "palette png with tRNS": ("x.png", lambda p: PALETTE.save(p, transparency=TRANSPARENT), palette_over_white()),
    "palette gif with transparency": ("x.gif", lambda p: PALETTE.save(p, transparency=TRANSPARENT), palette_over_white()),
    "rgba png": ("x.png", lambda p: Image.fromarray(RGBA).save(p), over_white(RGB, ALPHA)),
    "rgba tiff": ("x.tif", lambda p: Image.fromarray(RGBA).save(p), over_white(RGB, ALPHA)),
    "rgba webp": (
        "x.webp", lambda p: Image.fromarray(RGBA).save(p, lossless=True, exact=True), over_white(RGB, ALPHA),
    ),
    "grey and alpha png": ("x.png", lambda p: Image.fromarray(LA).save(p), over_white(three(GREY), ALPHA)),
    "rgb png with tRNS": ("x.png", lambda p: Image.fromarray(RGB).save(p, transparency=tuple(map(int, KEY))), keyed()),
    "grey png with tRNS": (
        "x.png", lambda p: Image.fromarray(GREY).save(p, transparency=int(KEY[0])), three(grey_keyed()),
    ),
    "16 bits png": ("x.png", lambda p: Image.fromarray(DEEP).save(p), three(scaled(DEEP, 65_535))),
    "16 bits tiff": ("x.tif", lambda p: Image.fromarray(DEEP).save(p), three(scaled(DEEP, 65_535))),
    "16 bits pgm": (
        "x.pgm", lambda p: p.write_bytes(b"P5 12 8 65535\n" + DEEP.astype(">u2").tobytes()), three(scaled(DEEP, 65_535)),
    ),
    "cmyk tiff": ("x.tif", lambda p: Image.fromarray(CMYK, "CMYK").save(p), cmyk(CMYK)),
    "animated gif": (
        "x.gif", lambda p: PALETTE.save(p, save_all=True, append_images=[PALETTE.rotate(180)]), LOOKED_UP,
    ),
    "animated webp": (
        "x.webp", lambda p: Image.fromarray(RGB).save(p, lossless=True, **SECOND), RGB,
    ),
    "animated png": (
        "x.png", lambda p: Image.fromarray(RGB).save(p, **SECOND), RGB,
    ),
    "two pages tiff": (
        "x.tif", lambda p: Image.fromarray(RGB).save(p, **SECOND), RGB,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_every_mode_by_its_rule(case: str, tmp_path: Path) -> None:
    name, make, expected = CASES[case]
    make(tmp_path / name)
    got = read_image(tmp_path / name, EXACT)
    assert got.dtype == np.uint8 and got.shape == (HEIGHT, WIDTH, 3)
    if case.startswith("cmyk"):
        assert np.abs(got - expected).max() <= 1  # Pillow's own rounding
    else:
        np.testing.assert_array_equal(got, expected)


def test_modes_that_no_common_writer_makes() -> None:
    from refold.imaging.convert import to_rgb

    rgba = Image.fromarray(RGBA)
    premultiplied, expected = np.asarray(to_rgb(rgba.convert("RGBa"))), over_white(RGB, ALPHA)
    assert np.abs(premultiplied.astype(int) - expected).max() <= 1  # multiplied and divided again
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(RGB).convert("RGBX"))), RGB)
    np.testing.assert_allclose(np.asarray(to_rgb(Image.fromarray(RGB).convert("YCbCr"))).astype(int), RGB, atol=3)
    palette = PALETTE.convert("PA")
    palette.putalpha(Image.fromarray(ALPHA))
    np.testing.assert_array_equal(np.asarray(to_rgb(palette)), over_white(LOOKED_UP, ALPHA))
    for mode in ("LAB", "HSV", "F"):
        with pytest.raises(InputError) as e:
            to_rgb(Image.new(mode, (4, 4)))
        assert e.value.code == "not-rgb" and mode in e.value.message


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_a_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    flat = np.full((16, 16, 4), (200, 40, 10, 30), np.uint8)
    Image.fromarray(flat, "CMYK").save(tmp_path / "x.jpg", quality=100)  # with Adobe's marker, inverted in the file
    got = read_image(tmp_path / "x.jpg", Preprocess(16, 16))
    np.testing.assert_allclose(got.astype(float), cmyk(flat), atol=3)


def test_twelve_bits_are_scaled_by_twelve_and_white_may_be_zero() -> None:
    from refold.imaging.convert import to_rgb

    picture = Image.fromarray((DEEP >> 4).astype(np.uint16))
    picture.tag_v2 = {258: (12,), 262: 1}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), three(scaled(DEEP >> 4, 4095)))
    picture = Image.fromarray(DEEP)
    picture.tag_v2 = {258: (16,), 262: 0}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(to_rgb(picture)), three(scaled(65_535 - DEEP, 65_535)))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_values_without_a_largest_one_are_refused(dtype: str, tmp_path: Path) -> None:
    Image.fromarray(np.ones((HEIGHT, WIDTH), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(InputError) as e:
        read_image(tmp_path / "x.tif", EXACT)
    assert e.value.code == "not-rgb" and e.value.message.startswith("The image ")


STORED = {  # how the upright image lies in the file: EXIF 2.32, orientation, "row 0 is the visual top, ..."
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_all_orientations(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = np.kron(RGB[::2, ::2], np.ones((8, 8, 1), np.uint8))  # JPEG's blocks, so that it loses little
    stored = np.ascontiguousarray(STORED[orientation](smooth))
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif, **options)
    got = read_image(tmp_path / f"x.{suffix}", Preprocess(smooth.shape[1], smooth.shape[0]))
    np.testing.assert_allclose(got.astype(int), smooth, atol=3 if suffix == "jpg" else 0)


def test_a_damaged_or_senseless_orientation_counts_as_none(tmp_path: Path) -> None:
    for i, block in enumerate((b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0", b"")):
        path = tmp_path / f"{i}.png"
        Image.fromarray(RGB).save(path, exif=block)
        np.testing.assert_array_equal(read_image(path, EXACT), RGB)


@pytest.mark.parametrize("resize", [(Resize.EXACT, 0), (Resize.STRETCH, 0), (Resize.CENTRE_CROP, 10), (Resize.CENTRE_CROP, 12)])
def test_plain_rgb_is_what_pillow_alone_gives(resize: tuple[Resize, int], tmp_path: Path) -> None:
    size = (WIDTH, HEIGHT) if resize[0] is Resize.EXACT else (31, 17)
    picture = Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    picture.save(tmp_path / "x.png")
    preprocess = Preprocess(WIDTH, HEIGHT, resize=resize[0], resize_short=max(resize[1], WIDTH) if resize[1] else 0)
    if resize[0] is Resize.STRETCH:
        picture = picture.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    elif resize[0] is Resize.CENTRE_CROP:
        ratio = preprocess.resize_short / 17
        near = (max(WIDTH, round(31 * ratio)), max(HEIGHT, round(17 * ratio)))
        left, top = (near[0] - WIDTH) // 2, (near[1] - HEIGHT) // 2
        picture = picture.resize(near, Image.Resampling.BILINEAR).crop((left, top, left + WIDTH, top + HEIGHT))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", preprocess), np.asarray(picture))


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "preprocess", [EXACT, Preprocess(9, 9, resize=Resize.STRETCH), Preprocess(6, 6, resize=Resize.CENTRE_CROP, resize_short=7)]
)
def test_calibration_device_and_service_see_the_same_bytes(preprocess: Preprocess, tmp_path: Path) -> None:
    for i, (name, make, _) in enumerate(CASES.values()):
        make(tmp_path / f"{i:02}-{name}")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(RGB.swapaxes(0, 1)[::-1])).save(tmp_path / "98-turned.png", exif=exif)
    (tmp_path / "99-broken.gif").write_bytes(b"GIF89a")
    source = open_source(str(tmp_path), preprocess)
    device = {p.name: p.image for p in source if p is not None}
    calibration = load_pictures(tmp_path, preprocess)
    assert len(device) == len(CASES) + 1 == len(calibration.images) and source.skipped.count == 1 == len(calibration.skipped)
    np.testing.assert_array_equal(np.stack([device[name] for name in sorted(device)]), calibration.images)
    for image in device.values():
        codec, payload = encode_image(image)
        np.testing.assert_array_equal(decode_picture(codec, payload, preprocess.width, preprocess.height), image)


def test_an_uploaded_image_is_unpacked_only_at_its_announced_size() -> None:
    from refold.v1 import samples_pb2 as pb

    def payload(picture: Image.Image, **options: Any) -> bytes:
        out = io.BytesIO()
        picture.save(out, "WEBP", lossless=True, **options)
        return out.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 3
    square = Image.fromarray(RGB[:8, :8])
    codec = pb.IMAGE_CODEC_WEBP_LOSSLESS
    with pytest.raises(InputError, match="header says"):
        decode_picture(codec, payload(Image.new("RGB", (4000, 4000))), 8, 8)
    with pytest.raises(InputError, match="animation"):
        decode_picture(codec, payload(square, save_all=True, append_images=[square.rotate(90)]), 8, 8)
    np.testing.assert_array_equal(decode_picture(codec, payload(square, exif=exif), 8, 8), RGB[:8, :8][::-1, ::-1])
    with pytest.raises(InputError):
        decode_picture(codec, payload(square)[:-20], 8, 8)


def test_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(RGB).save(out, "PNG")
    header = bytearray(out.getvalue())
    for size in ((30_000, 3_000), (2**31 - 1, 2**31 - 1)):
        header[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        header[29:33] = PngImagePlugin._crc32(bytes(header[12:29])).to_bytes(4, "big")
        (tmp_path / "x.png").write_bytes(header)
        with pytest.raises(InputError) as e:
            read_image(tmp_path / "x.png", Preprocess(4, 4, resize=Resize.STRETCH))
        assert e.value.code == "too-large"


SEEDS: list[bytes] = []
for kind in FORMATS:
    buffer = io.BytesIO()
    (PALETTE if kind == "GIF" else Image.fromarray(RGB)).save(buffer, kind)
    SEEDS.append(buffer.getvalue())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), st.floats(0, 1))
def test_damaged_bytes_are_an_image_or_one_sentence(seed: bytes, changes: list[tuple[int, int]], share: float) -> None:
    content = bytearray(seed[: max(1, int(len(seed) * share))] if share < 0.8 else seed)
    for place, value in changes:
        content[place % len(content)] = value
    try:
        picture = decoded(io.BytesIO(bytes(content)))
    except InputError as e:
        assert e.message and e.code in ("unreadable", "not-rgb", "too-large")
    else:
        assert picture.mode == "RGB"


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, which must not wait for anybody."""
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert out, "it waits"
    return out[0]


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder with two images and everything that is named as one and is no file."""
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("a.png", "z.png"):
        Image.fromarray(RGB).save(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "directory.png").mkdir()
    (folder / "dangling.png").symlink_to(folder / "nothing")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "to_pipe.png").symlink_to(folder / "pipe.png")
    (folder / "to_image.png").symlink_to(folder / "a.png")
    with socket.socket(socket.AF_UNIX) as s:
        here = os.open(folder, os.O_RDONLY)
        s.bind(f"/proc/self/fd/{here}/socket.png")  # a path of its own may be too long for a socket
        os.close(here)
    return folder


def test_nothing_that_is_no_file_is_waited_for(crowded: Path) -> None:
    source = open_source(str(crowded), EXACT)
    found = within(20, lambda: [p.name for p in source if p is not None])
    assert found == ["a.png", "to_image.png", "z.png"] and source.skipped.count == 7
    calibration = within(20, lambda: load_pictures(crowded, EXACT))
    told = " ".join(calibration.skipped)
    assert len(calibration.images) == 3
    for name, what in {"pipe": "a named pipe", "to_pipe": "a named pipe", "device": "a device", "socket": "a socket"}.items():
        assert f"{name}.png is {what}, not a file" in told
    assert "dangling.png cannot be read: No such file" in told and "loop.png cannot be read: Too many levels" in told


def test_one_path_that_is_no_file(crowded: Path) -> None:
    os.mkfifo(crowded / "pipe.npz")
    os.mkfifo(crowded / "pipe.mp4")
    for name in ("pipe.png", "to_pipe.png", "pipe.npz", "pipe.mp4"):
        with pytest.raises((InputError, Exception), match="named pipe") as e:
            _raised(within(10, lambda name=name: _outcome(lambda: open_source(str(crowded / name), EXACT))))
        assert e.value.exit_code in (2, 3)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as e:
        return e


def _raised(outcome: Any) -> None:
    if isinstance(outcome, Exception):
        raise outcome


def test_suffixes_cover_the_formats() -> None:
    assert {Image.registered_extensions()[s] for s in SUFFIXES} == set(FORMATS)
