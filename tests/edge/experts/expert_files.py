"""Small paged models: real records in a real file, behind some bytes as a bundle has them."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from refold.experts import ExpertIndex, Geometry, Record, encode, quantise

BASE = 2 * 4096


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.001)


def make_index(bits=None, **shape):
    """(index, content of the file). bits: by (layer, expert), 4 unless given."""
    return _made(tuple(sorted((bits or {}).items())), **shape)


@functools.cache
def _made(bits, layers=(0, 1, 2), experts=8, top_k=2, hidden=64, intermediate=32, seed=0):
    bits = dict(bits)
    geometry = Geometry("mixtral", tuple(layers), experts, top_k, hidden, intermediate, True, "silu", 32)
    rng = np.random.default_rng(seed)
    records, parts, at = {}, [os.urandom(BASE)], 0
    for layer in layers:
        for expert in range(experts):
            b = bits.get((layer, expert), 4)
            matrices = [quantise(rng.normal(size=s).astype(np.float32), b, 32) for s in geometry.shapes]
            record = encode(layer % 65536, expert, matrices)
            records[layer, expert] = Record(layer, expert, b, at, len(record), hashlib.sha256(record).hexdigest())
            parts.append(record)
            at += len(record)
    return ExpertIndex(geometry, records), b"".join(parts)


def write_model(folder: Path, **kwargs):
    """(path, index, content)."""
    index, content = make_index(**kwargs)
    path = folder / "m.refold"
    path.write_bytes(content)
    return path, index, content


def expected(content: bytes, index: ExpertIndex, layer: int, expert: int) -> bytes:
    r = index[layer, expert]
    return content[BASE + r.offset : BASE + r.offset + r.size]
