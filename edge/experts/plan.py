"""What a memory and a disk will give, before anything runs.

A token needs bytes that are not in memory, D = bytes / disk rate seconds of reading, and C seconds of computing. No read-ahead
gets below max(C, D); reading only when asked takes C + D (specs: the two bounds of any pager). Between them lies what a run
will show.

The hit rate comes from a routing trace, replayed under the same budget, or from the calibration's frequencies, as if each
token chose
anew: then a cache holds the most frequent, and hits are the sum of their frequencies. Real text repeats itself, so that is a
low guess.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.experts.cache import check_budget, floor, frequencies, memory_sizes
from edge.experts.policies import F64, I64, Layout, ValueWeights
from edge.experts.raw import RawFile
from edge.experts.replay import belady, replay
from edge.experts.trace import Trace
from refold.errors import InputError, StorageError, UsageError
from refold.experts import ALIGNMENT, ExpertIndex
from refold.sizes import parse_size

__all__ = ["Plan", "check_trace", "measure_disk", "parse_rate", "plan"]

MEASURE_SECONDS = 2.0
THREADS = 2


@dataclass(frozen=True)
class Plan:
    """What to expect.

    Attributes:
        budget, floor, total: bytes for experts, the least that runs, and of all experts.
        slots: mean records per layer that the budget holds. experts, top_k, layers: of the model.
        hit_rate: predicted, strict. belady: of the optimum on the trace, None without one. source: where the rate comes from.
        bytes_per_token: to read. cold_bytes: of a token with nothing in memory.
        disk: bytes per second. read_seconds: D. compute_seconds: C, None where not told.
        fastest: tokens per second at max(C, D). slowest: at C + D, reading only when asked.
    """

    budget: int
    floor: int
    total: int
    slots: float
    experts: int
    top_k: int
    layers: int
    hit_rate: float
    belady: float | None
    source: str
    bytes_per_token: float
    cold_bytes: float
    disk: float
    read_seconds: float
    compute_seconds: float | None
    fastest: float | None
    slowest: float | None
    needed_hit_rate: float | None


def plan(
    index: ExpertIndex,
    budget: int,
    disk: float,
    *,
    name: str = "the model",
    compute: float | None = None,
    trace: Trace | None = None,
    policy: str = "value",
    weights: ValueWeights | None = None,
) -> Plan:
    """Predicts.

    Args:
        disk: bytes per second. compute: seconds per token with every expert in memory.

    Raises:
        UsageError: the budget is under the floor, a rate is not positive, or the trace is of another model.
    """
    if disk <= 0 or (compute is not None and compute <= 0):
        raise UsageError("A disk rate and a compute time are above 0.")
    g, sizes, frequency = index.geometry, memory_sizes(index), frequencies(index)
    layout, least = Layout(g.layers, g.experts), floor(index, sizes)
    check_budget(index, budget, least, name)
    best: float | None = None
    if trace is not None:
        check_trace(trace, index)
        skip = len(trace) // 4
        told = replay(trace, sizes, budget, policy, frequency=frequency, weights=weights, skip=skip)
        best = belady(trace, sizes, budget, skip=skip).hit_rate
        rate, per_token = told.hit_rate, told.bytes_per_token
        cold = per_token / (1 - rate) if rate < 1 else float(sizes.mean() * g.top_k * len(g.layers))
        source = f"replay of {len(trace):,} tokens with the policy `{policy}`"
    else:
        use = frequency if frequency.any() else np.full(layout.count, g.top_k / g.experts)
        share = np.repeat(use.reshape(len(g.layers), -1).sum(1), g.experts)
        use = np.minimum(use * g.top_k / np.maximum(share, 1e-12), 1.0)  # a layer's add up to top-k
        resident = _most_used(use, sizes, budget)
        cold = float((use * sizes).sum())
        per_token = float((use * sizes)[~resident].sum())
        rate = float(use[resident].sum() / use.sum())
        source = "frequencies of the calibration text" if frequency.any() else "guess that all experts are used equally"
    read = per_token / disk
    return Plan(
        budget=budget,
        floor=least,
        total=int(sizes.sum()),
        slots=min(budget / (float(sizes.mean()) * len(g.layers)), float(g.experts)),
        experts=g.experts,
        top_k=g.top_k,
        layers=len(g.layers),
        hit_rate=rate,
        belady=best,
        source=source,
        bytes_per_token=per_token,
        cold_bytes=cold,
        disk=disk,
        read_seconds=read,
        compute_seconds=compute,
        fastest=None if compute is None else 1 / max(compute, read),
        slowest=None if compute is None else 1 / (compute + read),
        needed_hit_rate=None if compute is None or cold <= 0 else max(1 - disk * compute / cold, 0.0),
    )


def _most_used(use: F64, sizes: I64, budget: int) -> NDArray[np.bool_]:
    """bool (count,): the most frequent that the budget holds."""
    order = np.argsort(-use, kind="stable")
    out: NDArray[np.bool_] = np.zeros(len(use), np.bool_)
    out[order[np.cumsum(sizes[order]) <= budget]] = True
    return out


def check_trace(trace: Trace, index: ExpertIndex) -> None:
    """Raises UsageError where the trace is of a model of another shape."""
    g = index.geometry
    if (trace.layers, trace.experts) != (g.layers, g.experts):
        raise UsageError(
            f"The trace has {len(trace.layers)} layers of {trace.experts} experts, the model {len(g.layers)} of {g.experts}: "
            "record one with this model.",
            code="trace",
        )


def parse_rate(text: str) -> float:
    """Bytes per second in `850MB/s`, `0.85 GB/s` or `850MB`. Raises UsageError."""
    stem = text.strip()
    return float(parse_size(stem[:-2] if stem.lower().endswith("/s") else stem))


def measure_disk(
    path: Path,
    at: int,
    length: int,
    record: int,
    *,
    seconds: float = MEASURE_SECONDS,
    step: Callable[[float], None] = lambda _: None,
) -> float:
    """Bytes per second of the reads that the pager does: records at random places of a file, past the page cache, two threads.

    Args:
        at: offset of the records. length: bytes of them. record: bytes of one, a multiple of 4,096.
        step: called now and then with the share of the time that has gone by.

    Raises:
        StorageError: the file cannot be read.
    """
    raw = RawFile(path, probe=at)
    count = max(length // record, 1)
    size = min(record, length) // ALIGNMENT * ALIGNMENT
    done, errors = [0] * THREADS, []
    begin = time.perf_counter()

    def reader(number: int) -> None:
        choose = random.Random(number)
        try:
            with mmap.mmap(-1, size) as buffer, memoryview(buffer) as view:
                while time.perf_counter() - begin < seconds:
                    start = at + choose.randrange(count) * record
                    for block in range(0, size, 512 * 1024):
                        n = raw.read(view[block : block + 512 * 1024], start + block)
                        if n <= 0:
                            raise OSError(0, os.strerror(5) + ": the file ends early")
                        done[number] += n
        except OSError as e:
            errors.append(e)

    threads = [threading.Thread(target=reader, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        threads[0].join(0.1)
        threads[-1].join(0.1)
        step(min((time.perf_counter() - begin) / seconds, 1.0))
    took = time.perf_counter() - begin
    raw.close()
    if errors:
        raise StorageError(f"{path} cannot be read: {errors[0].strerror or errors[0]}. Check the disk.")
    if not sum(done):
        raise InputError(f"{path} has no records to measure the disk with.")
    return sum(done) / took
