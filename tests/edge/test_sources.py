"""Sources: every picture is served or counted and named; order, pace and repetition are what was asked for."""

from __future__ import annotations

import io
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from small_nets import images

from edge.sources import Stream, fit, load_picture, open_source
from edge.sources.video import VideoSource
from refold import Preprocess, Resize
from refold.errors import InputError, RefoldError, UsageError

EXACT = Preprocess(16, 16)


def save(folder, name, picture):
    Image.fromarray(picture).save(folder / name)


@pytest.fixture
def folder(tmp_path):
    for i, picture in enumerate(images(6, 16)):
        save(tmp_path, f"{i}.png", picture)
    return tmp_path


def served(source):
    return [p for p in source if p is not None]


def test_a_folder_in_order_bit_for_bit(folder):
    found = served(open_source(str(folder), EXACT))
    assert [p.name for p in found] == [f"{i}.png" for i in range(6)]
    np.testing.assert_array_equal(np.stack([p.image for p in found]), images(6, 16))


def test_bad_pictures_are_skipped_counted_and_named(folder, caplog):
    rgb = images(1, 16)[0]
    (folder / "a_noise.png").write_bytes(b"not a picture")
    (folder / "b_cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "c_empty.jpg").write_bytes(b"")
    save(folder, "d_grey.png", rgb[..., 0])
    save(folder, "e_alpha.png", np.dstack([rgb, rgb[..., :1]]))
    Image.fromarray(rgb).quantize(8).save(folder / "f_palette.png")
    Image.fromarray(rgb).convert("CMYK").save(folder / "g_cmyk.jpg")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 256).save(folder / "h_16bit.png")
    save(folder, "i_large.png", images(1, 20)[0])
    (folder / "j_readme.txt").write_text("no picture, and not meant to be one")
    (folder / "k_directory.png").mkdir()
    source = open_source(str(folder), EXACT)
    assert len(served(source)) == 11 and source.skipped.count == 5  # grey, alpha, palette, CMYK and 16 bits are converted
    for name in ("a_noise", "b_cut", "c_empty", "i_large", "k_directory"):
        assert name in caplog.text
    assert "k_directory" not in source.skipped.last and "c_empty" in source.skipped.last  # damaged ones are looked at twice


def test_decompression_bombs_are_refused_by_their_header(tmp_path):
    save(tmp_path, "x.png", images(1, 16)[0])
    header = bytearray((tmp_path / "x.png").read_bytes())
    header[16:24] = (30_000).to_bytes(4, "big") + (3_000).to_bytes(4, "big")
    header[29:33] = PngImagePlugin._crc32(bytes(header[12:29])).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(header)
    for preprocess in (EXACT, Preprocess(16, 16, resize=Resize.STRETCH)):
        with pytest.raises(InputError) as e:
            load_picture(tmp_path / "x.png", preprocess)
        assert e.value.code == "too-large"


@pytest.mark.parametrize(("resize", "short"), [(Resize.STRETCH, 0), (Resize.CENTRE_CROP, 20), (Resize.CENTRE_CROP, 0)])
@pytest.mark.parametrize(("width", "height"), [(40, 30), (16, 16), (7, 90), (1, 1)])
def test_resizing_gives_the_models_size(tmp_path, resize, short, width, height):
    p = Preprocess(16, 12, resize=resize, resize_short=short)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    save(tmp_path, "x.png", picture)
    loaded = load_picture(tmp_path / "x.png", p)
    assert loaded.shape == (12, 16, 3) and loaded.dtype == np.uint8
    np.testing.assert_array_equal(fit(picture, p), loaded)


def test_a_centre_crop_takes_the_centre():
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, 16:48] = 200
    cropped = fit(picture, Preprocess(16, 16, resize=Resize.CENTRE_CROP))
    assert (cropped[:, 1:-1] == 200).all()


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_arrays(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(path, images=images(5, 16))
    else:
        np.save(path, images(5, 16))
    found = served(open_source(str(path), EXACT))
    np.testing.assert_array_equal(np.stack([p.image for p in found]), images(5, 16))
    assert found[3].name == f"x.{suffix}[3]"
    assert served(open_source(str(path), Preprocess(8, 8, resize=Resize.STRETCH)))[0].image.shape == (8, 8, 3)
    with pytest.raises(InputError, match="takes exactly 8x8"):
        open_source(str(path), Preprocess(8, 8))


def test_arrays_that_are_not_pictures_are_refused(tmp_path):
    for name, values in {"float": np.zeros((2, 16, 16, 3)), "grey": np.zeros((2, 16, 16), np.uint8)}.items():
        np.savez(tmp_path / f"{name}.npz", images=values)
        with pytest.raises(InputError, match="wanted is uint8"):
            open_source(str(tmp_path / f"{name}.npz"), EXACT)
    np.savez(tmp_path / "other.npz", pictures=images(2, 16))
    with pytest.raises(InputError, match="no array called images"):
        open_source(str(tmp_path / "other.npz"), EXACT)
    (tmp_path / "noise.npz").write_bytes(b"PK\x03\x04 nothing")
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    for name in ("noise.npz", "pickle.npy"):
        with pytest.raises(InputError, match="cannot be read"):
            open_source(str(tmp_path / name), EXACT)


def test_a_video_through_opencv(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "x.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 10, (16, 16))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no FFV1")
    pictures = images(4, 16)
    for picture in pictures:
        writer.write(picture[..., ::-1])
    writer.release()
    source = open_source(str(path), EXACT)
    found = served(source)
    source.close()
    assert len(found) == 4 and not source.live
    np.testing.assert_allclose(np.stack([p.image for p in found]).astype(int), pictures, atol=6)  # FFV1 may go through YUV
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="OpenCV cannot open broken"):
        open_source(str(tmp_path / "broken.mp4"), EXACT)


def test_without_opencv_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="pip install opencv-python-headless"):
        VideoSource(tmp_path / "x.mp4", EXACT)


def test_sources_that_are_not_there(tmp_path):
    for name in (str(tmp_path / "nothing"), "camera:front"):
        with pytest.raises(UsageError):
            open_source(name, EXACT)
    with pytest.raises(UsageError, match="holds no image"):
        open_source(str(tmp_path), EXACT)


def test_a_watched_folder_gives_what_arrives_later_and_only_when_complete(folder):
    stop = threading.Event()
    stream = Stream(lambda: open_source(str(folder), EXACT, watch=True), stop=stop)
    names = []

    def run():
        for frame in stream:
            if frame is not None:
                names.append(frame.name)

    thread = threading.Thread(target=run)
    thread.start()
    wait(lambda: len(names) == 6)
    content = (folder / "0.png").read_bytes()
    with (folder / "new.png").open("wb") as f:  # a slow copy: half a file is not a picture yet
        f.write(content[:300])
        f.flush()
        f.write(content[300:])
    wait(lambda: len(names) == 7)
    assert names[-1] == "new.png" and stream.skipped == 0
    save(folder, "new.png", images(1, 16, seed=9)[0])
    wait(lambda: len(names) == 8)
    stop.set()
    thread.join(5)
    stream.close()
    assert not thread.is_alive()


def wait(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["folder", "array"])
def test_repetition_and_limits(folder, tmp_path_factory, kind):
    if kind == "array":
        path = tmp_path_factory.mktemp("a") / "x.npz"
        np.savez(path, images=images(6, 16))
    else:
        path = folder
        (folder / "bad.png").write_bytes(b"")
    stream = Stream(lambda: open_source(str(path), EXACT), loop=True, max_frames=15)
    frames = [f for f in stream if f is not None]
    stream.close()
    assert [f.number for f in frames] == list(range(15))
    assert stream.lost == 0 and (stream.skipped in (2, 3)) == (kind == "folder")  # it reads ahead
    np.testing.assert_array_equal(frames[13].image, images(6, 16)[1])


def test_a_pace_is_kept(folder):
    began = time.perf_counter()
    assert len([f for f in Stream(lambda: open_source(str(folder), EXACT), fps=50) if f]) == 6
    assert time.perf_counter() - began >= 5 / 50


def test_of_a_live_source_the_newest_picture_is_served_and_the_others_counted():
    class Camera:
        live, slow = True, True

        def __init__(self):
            from edge.sources import Picture, Skipped

            self.skipped, self.picture, self.given, self.seen = Skipped(), Picture, 0, threading.Event()

        def __iter__(self):
            for i in range(50):
                self.given += 1
                if i == 49:
                    self.seen.set()
                yield self.picture(np.full((16, 16, 3), i, np.uint8), str(i))

        def close(self):
            return None

    camera = Camera()
    stream = Stream(lambda: camera)
    camera.seen.wait(10)
    time.sleep(0.05)
    frames = [f for f in stream if f is not None]
    assert frames[-1].name == "49" and len(frames) + stream.lost == 50 and stream.lost > 0


def test_a_source_that_fails_midway_says_so(folder):
    source = open_source(str(folder), EXACT, watch=True)
    source._names = lambda: (_ for _ in ()).throw(UsageError("the folder went away"))
    with pytest.raises(UsageError, match="went away"):
        list(Stream(lambda: source))
    source._names = lambda: 1 // 0
    with pytest.raises(RefoldError, match="The source failed: ZeroDivisionError"):
        list(Stream(lambda: source))


def growing(path, pauses):
    """Writes an image in pieces, as a slow copy does."""
    content = encoded(images(1, 16, seed=5)[0])
    with path.open("wb") as f:
        for i in range(pauses):
            f.write(content[i * len(content) // pauses : (i + 1) * len(content) // pauses])
            f.flush()
            time.sleep(0.45)


def encoded(picture):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("watch", [False, True])
def test_an_image_that_is_still_being_written_is_served_when_it_is_whole(folder, watch):
    stop = threading.Event()
    writer = threading.Thread(target=growing, args=(folder / "3_slow.png", 4))
    writer.start()
    wait((folder / "3_slow.png").exists)
    stream = Stream(lambda: open_source(str(folder), EXACT, watch=watch), stop=stop)
    frames = []
    for frame in stream:
        frames += [frame] if frame is not None else []
        if watch and len(frames) == 7:
            stop.set()
    writer.join()
    stream.close()
    assert [f.name for f in frames][-1] == "3_slow.png" and len(frames) == 7 and stream.skipped == 0
    np.testing.assert_array_equal(frames[-1].image, images(1, 16, seed=5)[0])


def test_what_stays_unreadable_is_counted_once_and_tried_again_when_it_changes(folder, monkeypatch):
    monkeypatch.setattr("edge.sources.stream.REST", 0.005)
    stop = threading.Event()
    (folder / "x.png").write_bytes(encoded(images(1, 16)[0])[:100])
    (folder / "link.png").symlink_to(folder.parent / "later.png")
    stream = Stream(lambda: open_source(str(folder), EXACT, watch=True), stop=stop)
    names = []

    def run():
        names.extend(f.name for f in stream if f is not None)

    thread = threading.Thread(target=run)
    thread.start()
    wait(lambda: stream.skipped == 2)
    time.sleep(0.3)
    assert stream.skipped == 2
    (folder / "x.png").write_bytes(encoded(images(1, 16)[0]))
    (folder.parent / "later.png").write_bytes(encoded(images(1, 16)[0]))
    wait(lambda: {"x.png", "link.png"} <= set(names))
    stop.set()
    thread.join(5)
    stream.close()
    assert stream.skipped == 2 and len(names) == 8
