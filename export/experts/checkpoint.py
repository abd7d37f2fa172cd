"""A Hugging Face checkpoint on disk: `config.json` and safetensors, in one file or in shards with an index."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refold.errors import BundleError, InputError
from refold.experts import generation
from refold.experts.tensors import DTYPES, Place, Tensor, parse_header

__all__ = ["Checkpoint"]

SINGLE, SHARDS, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOATS = ("F32", "F16", "BF16")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """Attributes:
    folder: where it lies. config: its config.json.
    places: every tensor, with the file it is in.
    """

    folder: Path
    config: Mapping[str, Any]
    places: Mapping[str, tuple[Path, Place]]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads headers only. Raises InputError: not a checkpoint, a shard missing or truncated."""
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder: give the one that holds config.json and safetensors.", code="checkpoint")
        config = _json(folder / CONFIG)
        if (folder / SHARDS).is_file():
            shards = _json(folder / SHARDS).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(v, str) and Path(v).name == v for v in shards.values()):
                raise InputError(f"{folder / SHARDS} is damaged: download it again.", code="checkpoint")
            files = sorted({folder / name for name in shards.values()})
        elif (folder / SINGLE).is_file():
            shards, files = {}, [folder / SINGLE]
        else:
            raise InputError(
                f"{folder} has neither {SINGLE} nor {SHARDS}: only safetensors are read. Convert the checkpoint first.",
                code="checkpoint",
            )
        places: dict[str, tuple[Path, Place]] = {}
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing: download this shard.", code="checkpoint")
            places.update({name: (file, place) for name, place in _header(file).items()})
        lost = [name for name in shards if name not in places]
        if lost:
            raise InputError(f"{folder / shards[lost[0]]} lacks {lost[0]}: download this shard again.", code="checkpoint")
        return cls(folder, config, places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name][1].shape

    def dtype(self, name: str) -> str:
        """Raises InputError: neither float32, float16, bfloat16 nor an integer."""
        dtype = self.places[name][1].dtype
        if dtype not in DTYPES:
            raise InputError(f"{name} is {dtype}: give a checkpoint in bfloat16, float16 or float32.", code="checkpoint")
        return dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or of a stacked one the part of one expert: no other byte is read. Raises InputError."""
        file, place = self.places[name]
        dtype = self.dtype(name)
        shape, start, size = place.shape, place.start, place.size
        if index is not None:
            size //= shape[0]
            shape, start = shape[1:], start + index * size
        try:
            with file.open("rb") as f:
                data = _read(f.fileno(), start, size)
        except OSError as e:
            raise InputError(f"{file} cannot be read: {e.strerror or e}.", code="checkpoint") from e
        if len(data) != size:
            raise InputError(f"{file} is truncated at {name}: download it again.", code="checkpoint")
        return Tensor(dtype, shape, data)

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors of one shape hold the same numbers; of one type, a block at a time. Raises InputError."""
        if self.shape(a) != self.shape(b):
            return False
        if self.dtype(a) != self.dtype(b):
            return bool((self.read(a).numpy() == self.read(b).numpy()).all())
        return all(x == y for x, y in zip(self._blocks(a), self._blocks(b), strict=True))

    def _blocks(self, name: str, size: int = 8 << 20) -> Iterator[bytes]:
        file, place = self.places[name]
        try:
            with file.open("rb") as f:
                for start in range(0, place.size, size):
                    yield _read(f.fileno(), place.start + start, min(size, place.size - start))
        except OSError as e:
            raise InputError(f"{file} cannot be read: {e.strerror or e}.", code="checkpoint") from e

    def tokenizer_files(self) -> dict[str, bytes]:
        """What there is of them; without a vocabulary, nothing."""
        if not any((self.folder / name).is_file() for name in VOCABULARIES):
            return {}
        return {name: (self.folder / name).read_bytes() for name in TOKENIZER if (self.folder / name).is_file()}

    def generation_files(self) -> dict[str, bytes]:
        """generation_config.json, where there is one. Raises InputError: no JSON object, or a value that cannot be meant."""
        path = self.folder / generation.FILE
        if not path.is_file():
            return {}
        if (wrong := generation.fault(_json(path))) is not None:
            raise InputError(f"{path} has a value that cannot be meant: {wrong}. Correct it.", code="checkpoint")
        return {generation.FILE: path.read_bytes()}

    def generation_notes(self) -> list[str]:
        """A sentence for each of its fields that a device will not honour."""
        return [note for content in self.generation_files().values() for note in generation.notes(json.loads(content))]

    def fingerprint(self) -> str:
        """Changes when a file of the checkpoint does: names, sizes, dates and headers, not the gigabytes."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, (file, place) in sorted(self.places.items()):
            digest.update(f"{name} {file.name} {place}".encode())
        for file in sorted({file for file, _ in self.places.values()}):
            told = file.stat()
            digest.update(f"{file.name} {told.st_size} {told.st_mtime_ns}".encode())
        return digest.hexdigest()


def _read(descriptor: int, start: int, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, min(size, 1 << 30), start)):
        pieces.append(piece)
        start, size = start + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _header(file: Path) -> dict[str, Place]:
    try:
        with file.open("rb") as f:
            return parse_header(lambda start, n: _read(f.fileno(), start, n), file.stat().st_size, str(file))
    except BundleError as e:
        raise InputError(e.message, code="checkpoint") from e
    except OSError as e:
        raise InputError(f"{file} cannot be read: {e.strerror or e}.", code="checkpoint") from e


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}.", code="checkpoint") from e
    except ValueError as e:
        raise InputError(f"{path} is no JSON: download it again.", code="checkpoint") from e
    if not isinstance(told, dict):
        raise InputError(f"{path} is damaged: download it again.", code="checkpoint")
    return told
