"""The model's files, in a folder that goes away afterwards: our bundle, llama.cpp's GGUF, safetensors for accelerate."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.experts import gguf
from bench.experts.disk import evict
from bench.experts.shape import Shape
from bench.experts.trace import SEED, Routing, routing
from bench.experts.weights import expert, resident, resident_names
from edge.experts.paths import PathTable
from refold.errors import StorageError
from refold.experts import Matrix, dequantise, encode
from refold.experts.paged import PagedModel
from refold.experts.tensors import Resident, packed
from refold.experts.write import write_paged

__all__ = ["Files", "Words", "check_space", "sizes", "write_bundle", "write_folder", "write_gguf", "write_paths"]

Told = Callable[[int], None]
CALIBRATION = 512  # tokens behind the words, of the same text: what an export would count frequencies on


@dataclass(frozen=True)
class Words:
    """The trace that the words follow. calibration: the routing of tokens that no engine is given. frequency: each expert's
    share of these."""

    shape: Shape
    trace: Routing
    frequency: dict[tuple[int, int], float]
    calibration: Routing
    seed: int = SEED

    @classmethod
    def of(cls, shape: Shape, seed: int = SEED) -> Words:
        whole = routing(shape.layers, shape.experts, shape.top_k, shape.tokens + CALIBRATION, seed)
        seen = whole[shape.tokens :]
        counts = Counter((layer, int(e)) for layer in range(shape.layers) for e in seen[:, layer].ravel())
        return cls(shape, whole[: shape.tokens], {key: n / CALIBRATION for key, n in counts.items()}, seen, seed)


@dataclass(frozen=True)
class Files:
    """Where one bit-width's files lie, whether or not they are written."""

    folder: Path
    bits: int

    @property
    def bundle(self) -> Path:
        return self.folder / f"routed-{self.bits}bit.refold"

    @property
    def gguf(self) -> Path:
        return self.folder / f"routed-{self.bits}bit.gguf"

    @property
    def safetensors(self) -> Path:
        return self.folder / "routed-bf16"

    @property
    def paths(self) -> Path:
        """Where a pager whose paths lie "beside" looks for its table."""
        return self.bundle.with_name(self.bundle.name + ".paths.npz")

    def remove(self) -> None:
        for path in (self.bundle, self.gguf, self.paths):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.safetensors, ignore_errors=True)


def sizes(shape: Shape, bits: int) -> int:
    """Bytes of bundle and GGUF together."""
    return 2 * (shape.expert_bytes(bits) + shape.resident_bytes)


def check_space(folder: Path, need: int) -> None:
    """Raises StorageError when the disk would be left with less than 2 GB."""
    free = shutil.disk_usage(folder).free
    if free < need + (2 << 30):
        raise StorageError(
            f"{folder} has {free / 1e9:.0f} GB free and the models take {need / 1e9:.0f} GB: "
            "free some, or choose another --work."
        )


def write_bundle(path: Path, words: Words, bits: int, told: Told = lambda n: None) -> None:
    """Raises StorageError: disk full or not writable."""
    shape = words.shape

    def records() -> Iterator[tuple[int, int, int, bytes]]:
        for layer in range(shape.layers):
            for number in range(shape.experts):
                record = encode(layer, number, expert(shape, layer, number, bits))
                told(len(record))
                yield layer, number, bits, record

    write_paged(path, shape.geometry, records(), shape.config(), _resident(words), name="routed", frequency=words.frequency)
    evict(path)


def write_paths(files: Files, words: Words) -> None:
    """The path table of a device that has run before: learnt from the calibration tokens. Raises StorageError."""
    table = PathTable(files.paths, PagedModel.open(files.bundle).index)
    for token in words.calibration.astype(np.int64):
        for position, experts in enumerate(token):
            table.learn(position, experts)
    table.write(table.dump())


def _resident(words: Words) -> list[Resident]:
    def reading(number: int) -> Callable[[], bytes]:
        return lambda: resident(words.shape, words.trace, number).tobytes()

    return [Resident(name, "F16", size, reading(i)) for i, (name, size) in enumerate(resident_names(words.shape))]


def write_gguf(path: Path, words: Words, bits: int, told: Told = lambda n: None) -> None:
    """Raises OSError: disk full or not writable."""
    gguf.write_model(path, words.shape, words.trace, bits, told)
    evict(path)


def write_folder(folder: Path, words: Words, bits: int, told: Told = lambda n: None) -> None:
    """A Hugging Face checkpoint with the decoded weights in bfloat16, one file, tensor after tensor."""
    shape, folder_config = words.shape, words.shape.config() | {"dtype": "bfloat16"}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [
        Resident(name, "BF16", size, _as_bf16(lambda i=i: resident(shape, words.trace, i).astype(np.float32)))  # type: ignore[misc]
        for i, (name, size) in enumerate(resident_names(shape))
    ]
    i, h = shape.intermediate, shape.hidden
    for layer in range(shape.layers):
        for number in range(shape.experts):
            for name, part, rows, size in (
                ("gate_proj", 0, slice(0, i), (i, h)),
                ("up_proj", 0, slice(i, 2 * i), (i, h)),
                ("down_proj", 1, slice(None), (h, i)),
            ):
                whole = f"model.layers.{layer}.mlp.experts.{number}.{name}.weight"
                tensors.append(Resident(whole, "BF16", size, _matrix(shape, layer, number, bits, part, rows, told)))
    with (folder / "model.safetensors").open("wb") as f:
        f.writelines(packed(tensors))
    (folder / "config.json").write_text(json.dumps(folder_config))
    evict(folder / "model.safetensors")


def _matrix(shape: Shape, layer: int, number: int, bits: int, part: int, rows: slice, told: Told) -> Callable[[], bytes]:
    def read() -> bytes:
        m = expert(shape, layer, number, bits)[part]
        scales, codes = m.scales[rows], m.codes[rows]
        out = _as_bf16(lambda: dequantise(Matrix((len(codes), m.shape[1]), bits, m.group, scales, codes)))()
        told(len(out))
        return out

    return read


def _as_bf16(make: Callable[[], np.ndarray]) -> Callable[[], bytes]:
    """Rounded to nearest, ties to even."""

    def read() -> bytes:
        wide = np.ascontiguousarray(make(), np.float32).view(np.uint32)
        return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16).tobytes()

    return read
