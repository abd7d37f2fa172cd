"""The path table: which experts follow which, layer by layer, learnt while a model runs and kept for the next time.

EdgeMoE (arXiv 2308.14352, §3.3) counts whole paths: the experts of two layers, and what the next layer used after them. Sets
of eight out of 64 never come twice, so here a set is taken apart: each pair (a of layer n - 2, b of layer n - 1) votes for
layer n,

    P2(i | a, b) = (count(a, b, i) + m P1(i | b)) / (count(a, b) + m)
    P1(i | b)    = (count(b, i) + m P0(i)) / (count(b) + m),     P0 likewise towards k / E

and the votes are pooled by how often each was seen: order two where it has been seen, order one where not, the layer's own
frequency at worst. Layer 0 follows the last two layers of the token before. For top-1 and exact sets this is EdgeMoE's table.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.experts.policies import I64
from refold.atomic import make_directory, write_atomically
from refold.errors import StorageError
from refold.experts import ExpertIndex

__all__ = ["PathTable"]

log = logging.getLogger(__name__)

ROWS_BYTES = 10 * 2**20  # of order two; more pairs than that are left to order one
MOST_PAIRS = 4 * 2**20  # layers x experts^2; beyond it (as in 48 layers of 512) pairs would hardly come twice: order one alone
FULL = 60_000  # uint16 counts are halved here, so that old habits fade


class PathTable:
    """Not thread-safe: the pager calls it under its lock.

    Args:
        file: where it is kept; None: nowhere.
        smoothing: m above, observations that the lower order counts for.
        order: 2 or 1.
    """

    def __init__(self, file: Path | None, index: ExpertIndex, *, smoothing: float = 2.0, order: int = 2) -> None:
        g = index.geometry
        self.file, self.smoothing = file, smoothing
        self.positions, self.experts, self.top_k = len(g.layers), g.experts, g.top_k
        self.key = hashlib.sha256(json.dumps(asdict(g)).encode()).hexdigest()
        self.learnt = 0
        self._one: NDArray[np.uint16] = np.zeros((self.positions, self.experts, self.experts + 1), np.uint16)  # last: count(b)
        self._zero: NDArray[np.float64] = np.zeros((self.positions, self.experts + 1))
        pairs = self.positions * self.experts**2
        self.order = order if pairs <= MOST_PAIRS else 1
        self._capacity = min(ROWS_BYTES // (2 * (self.experts + 1)), pairs) if self.order == 2 else 0
        self._two: NDArray[np.uint16] = np.zeros((self._capacity, self.experts + 1), np.uint16)  # no memory until touched
        self._row: NDArray[np.int32] = np.full(pairs if self.order == 2 else 0, -1, np.int32)
        self._keys: list[int] = []
        self._before: list[tuple[int, I64]] = []  # the last two requests

    # Learning and guessing

    def learn(self, position: int, experts: I64) -> None:
        """A layer asked for these; requests of more than one token (prefill) only break the path."""
        if len(experts) > self.top_k:
            self._before = []
            return
        if self._before and self._before[-1][0] != position:
            self._count(position, experts)
        self._before = [*self._before[-1:], (position, experts)]

    def _count(self, position: int, experts: I64) -> None:
        self.learnt += 1
        last = np.append(experts, self.experts)  # the count column goes up with them
        self._zero[position, last] += 1
        b = self._before[-1][1]
        one = self._one[position]
        one[b[:, None], last] += 1
        if one[b, -1].max(initial=0) >= FULL:
            one >>= 1
        if self.order == 2 and len(self._before) == 2:
            rows = self._rows(position, self._before[0][1], b, make=True)
            if len(rows):
                self._two[rows[:, None], last] += 1
                full = rows[self._two[rows, -1] >= FULL]
                self._two[full] >>= 1

    def _rows(self, position: int, a: I64, b: I64, *, make: bool) -> I64:
        keys = ((position * self.experts + a[:, None]) * self.experts + b).ravel()
        rows = self._row[keys]
        if make and rows.min(initial=0) < 0:
            new = keys[rows < 0][: self._capacity - len(self._keys)]
            self._row[new] = np.arange(len(self._keys), len(self._keys) + len(new), dtype=np.int32)
            self._keys += new.tolist()
            rows = self._row[keys]
        return np.asarray(rows[rows >= 0], np.int64)

    def predict(self, position: int) -> tuple[I64, NDArray[np.float64]] | None:
        """Experts that `position` will ask for after the last two requests, the likeliest first, and how likely each is: at
        most twice top-k. None: nothing is known yet."""
        if not self._before or self._zero[position, -1] < 1:
            return None
        m, e = self.smoothing, self.experts
        base = (self._zero[position, :e] + m * self.top_k / e) / (self._zero[position, e] + m)
        b = self._before[-1][1]
        counts = self._one[position][b].astype(np.float64)
        one = (counts[:, :e] + m * base) / (counts[:, e:] + m)
        score = one.mean(0)
        if self.order == 2 and len(self._before) == 2:
            a = self._before[0][1]
            rows = self._rows(position, a, b, make=False)
            if len(rows):
                seen = self._two[rows].astype(np.float64).sum(0)
                pairs = m * len(rows)
                score = (seen[:e] + pairs * score) / (seen[e] + pairs)
        best = np.argsort(-score, kind="stable")[: 2 * self.top_k]
        return best, score[best]

    # Keeping

    @classmethod
    def load(cls, file: Path | None, index: ExpertIndex, *, order: int = 2) -> PathTable:
        """What was kept, or an empty table where there is none or it belongs to another model."""
        table = cls(file, index, order=order)
        if file is not None and file.is_file():
            try:
                with file.open("rb") as content, np.load(content, allow_pickle=False) as f:
                    table._take(f)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
                log.warning("The path table %s cannot be used (%s): it is learnt anew.", file, e)
                table = cls(file, index, order=order)
        return table

    def _take(self, f: Any) -> None:
        if str(f["key"]) != self.key:
            raise ValueError("of another model")
        one, zero, keys, two = f["one"], f["zero"], f["keys"], f["two"]
        if one.shape != self._one.shape or zero.shape != self._zero.shape or two.shape != (len(keys), self.experts + 1):
            raise ValueError("misshapen")
        self._one[:], self._zero[:] = one, zero
        count = min(len(keys), self._capacity)
        self._two[:count] = two[:count]
        self._keys = keys[:count].tolist()
        self._row[self._keys] = np.arange(count, dtype=np.int32)

    def dump(self) -> bytes:
        """The file's content."""
        content = io.BytesIO()
        np.savez_compressed(
            content,
            key=np.array(self.key),
            one=self._one,
            zero=self._zero,
            keys=np.array(self._keys, np.int64),
            two=self._two[: len(self._keys)],
        )
        return content.getvalue()

    def write(self, content: bytes) -> None:
        """In one step; of two processes the later wins. Raises StorageError."""
        if self.file is not None:
            try:
                make_directory(self.file.parent)
            except OSError as e:
                raise StorageError(f"{self.file.parent} cannot be made: {e.strerror or e}.") from e
            write_atomically(self.file, [content])

    def save_or_warn(self) -> None:
        """What was learnt is worth keeping, but not an error at the end of a good run."""
        try:
            self.write(self.dump())
        except StorageError as e:
            log.warning("The path table is not kept: %s", e.message)
