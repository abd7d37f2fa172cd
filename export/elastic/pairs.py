"""Measured (genome, accuracy) pairs: what the predictor learns from. Kept line by line, so that a stopped search loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.elastic.genome import Genome, GenomeSampler
from export.elastic.judge import Judge
from export.elastic.space import Form
from refold.errors import StorageError

__all__ = ["Pairs", "measured_pairs"]

Pairs = dict[Genome, float]


def measured_pairs(
    judge: Judge, count: int, seed: int, path: Path, on_pair: Callable[[int], None] = lambda done: None
) -> Pairs:
    """At least `count` pairs, those in `path` first.

    Args:
        path: of one supernet, one target and one set of pictures; a last line cut off by a kill is measured again.

    Raises:
        StorageError: a line cannot be written.
    """
    space, layout = judge.supernet.space, judge.supernet.layout
    pairs = _read(path)
    sampler, rng = GenomeSampler(space, layout), np.random.default_rng((seed, 8))
    misses = 0
    while len(pairs) < count and misses < 100 * count:  # a small space may hold fewer
        genome = sampler.draw(rng)
        if genome in pairs:
            misses += 1
            continue
        pairs[genome] = judge.accuracy(genome.configuration(space, layout))
        _append(path, genome, pairs[genome])
        on_pair(len(pairs))
    return pairs


def _read(path: Path) -> Pairs:
    if not path.is_file():
        return {}
    found: Pairs = {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    for line in filter(None, whole.split("\n")):
        row = json.loads(line)
        bits = (tuple(int(c) for c in row[k]) for k in ("w", "a"))
        found[Genome(Form(*row["form"]), *bits)] = row["accuracy"]
    return found


def _append(path: Path, genome: Genome, accuracy: float) -> None:
    form = genome.form
    row = {
        "form": [form.per_channel, form.weight_symmetric, form.activation_symmetric],
        "w": "".join(map(str, genome.weight_bits)), "a": "".join(map(str, genome.activation_bits)), "accuracy": accuracy,
    }  # fmt: skip
    try:
        text = path.read_bytes() if path.is_file() else b""
        with path.open("r+b" if text else "wb") as f:
            f.seek(text.rfind(b"\n") + 1)
            f.truncate()
            f.write(json.dumps(row).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise StorageError(f"{path} cannot be written: {e.strerror or e}.") from e
