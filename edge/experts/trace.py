"""The routing of a run as a file: for each token and layer the experts, in order of the layers that have experts.

.npz      compact: layers, experts, top_k, per request its position and end in one flat array, per token its end
.jsonl    a head {"layers": ..., "experts": ..., "top_k": ...} and per token one line [[position, [experts]], ...]; may be cut
off
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from edge.experts.policies import I64, Layout
from refold.atomic import write_atomically
from refold.errors import InputError, StorageError, UsageError
from refold.experts import Geometry

__all__ = ["Trace", "TraceWriter"]

Request = tuple[int, I64]  # position, experts of the layer


@dataclass(frozen=True)
class Trace:
    """A routing. tokens: per token its requests in the order in which they came; a prefill chunk is one token of wide
    requests."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    tokens: Sequence[Sequence[Request]]

    @property
    def layout(self) -> Layout:
        return Layout(self.layers, self.experts)

    def __len__(self) -> int:
        return len(self.tokens)

    def requests(self) -> Iterator[tuple[int, int, I64]]:
        """(token, position, numbers of experts as in policies.Layout)."""
        for t, token in enumerate(self.tokens):
            for position, experts in token:
                yield t, position, experts + position * self.experts

    def part(self, begin: int, end: int | None = None) -> Trace:
        return Trace(self.layers, self.experts, self.top_k, self.tokens[begin:end])

    def save(self, path: Path) -> None:
        """By the ending of the name. Raises StorageError, UsageError."""
        with TraceWriter(path, self.layers, self.experts, self.top_k) as writer:
            for token in self.tokens:
                for position, experts in token:
                    writer.layer(position, experts.tolist())
                writer.token()

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Raises InputError: cannot be read or is no trace."""
        try:
            return _load_npz(path) if path.suffix == ".npz" else _load_jsonl(path)
        except OSError as e:
            raise InputError(f"The trace {path} cannot be read: {e.strerror or e}.") from e
        except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise InputError(f"{path} is no routing trace: record one with `refold edge generate --trace`.") from e


def _load_npz(path: Path) -> Trace:
    with path.open("rb") as content, np.load(content, allow_pickle=False) as f:
        layers, experts, top_k = tuple(f["layers"].tolist()), int(f["experts"]), int(f["top_k"])
        flat, positions, ends, token_ends = (f[n].astype(np.int64) for n in ("flat", "positions", "ends", "tokens"))
    pieces = np.split(flat, ends[:-1]) if len(ends) else []
    requests = [(int(p), piece) for p, piece in zip(positions, pieces, strict=True)]
    starts = [0, *token_ends[:-1].tolist()]
    return _checked(Trace(layers, experts, top_k, [requests[a:b] for a, b in zip(starts, token_ends.tolist(), strict=False)]))


def _load_jsonl(path: Path) -> Trace:
    with path.open(encoding="utf-8") as f:
        head = json.loads(f.readline())
        tokens = []
        for line in f:
            if not line.endswith("\n"):
                break  # its writer was killed
            tokens.append([(int(p), np.array(e, np.int64)) for p, e in json.loads(line)])
    return _checked(Trace(tuple(int(x) for x in head["layers"]), int(head["experts"]), int(head["top_k"]), tokens))


def _checked(trace: Trace) -> Trace:
    for token in trace.tokens:
        for position, experts in token:
            if not 0 <= position < len(trace.layers) or (
                len(experts) and not 0 <= experts.min() <= experts.max() < trace.experts
            ):
                raise ValueError("out of range")
    return trace


class TraceWriter:
    """Writes a trace while it happens. A .jsonl grows line by line; a .npz is written in one step by `close`.

    Raises:
        UsageError: another ending. StorageError: the disk.
    """

    def __init__(self, path: Path, layers: Sequence[int], experts: int, top_k: int) -> None:
        if path.suffix not in (".npz", ".jsonl"):
            raise UsageError(f"A trace is a .npz or a .jsonl file, not {path.name}.")
        self.path, self.layers, self.experts, self.top_k = path, tuple(layers), experts, top_k
        self._now: list[tuple[int, list[int]]] = []
        self._tokens: list[list[tuple[int, list[int]]]] = []
        self._file: IO[str] | None = None
        if path.suffix == ".jsonl":
            try:
                self._file = path.open("w", encoding="utf-8")
            except OSError as e:
                raise StorageError(f"{path} cannot be written: {e.strerror or e}.") from e
            self._line({"layers": list(self.layers), "experts": experts, "top_k": top_k})

    @classmethod
    def of(cls, path: Path, geometry: Geometry) -> TraceWriter:
        return cls(path, geometry.layers, geometry.experts, geometry.top_k)

    def layer(self, position: int, experts: Sequence[int]) -> None:
        self._now.append((position, list(experts)))

    def token(self) -> None:
        if self._file is not None:
            self._line([[p, e] for p, e in self._now])
        else:
            self._tokens.append(self._now)
        self._now = []

    def _line(self, content: object) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(content, separators=(",", ":")) + "\n")
        except OSError as e:
            raise StorageError(f"{self.path} cannot be written: {e.strerror or e}.") from e

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as e:
                raise StorageError(f"{self.path} cannot be written: {e.strerror or e}.") from e
            return
        requests = [r for token in self._tokens for r in token]
        content = io.BytesIO()
        np.savez_compressed(
            content,
            layers=np.array(self.layers, np.int32),
            experts=np.int32(self.experts),
            top_k=np.int32(self.top_k),
            flat=np.array([e for _, experts in requests for e in experts], np.uint16),
            positions=np.array([p for p, _ in requests], np.uint16),
            ends=np.cumsum([len(e) for _, e in requests], dtype=np.int64),
            tokens=np.cumsum([len(t) for t in self._tokens], dtype=np.int64),
        )
        write_atomically(self.path, [content.getvalue()])

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(StorageError) if kind is not None else nullcontext():  # the first error is the one to report
            self.close()
