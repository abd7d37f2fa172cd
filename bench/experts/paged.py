"""Our runtime as an engine, and what stands in for its pager: the kernel's page cache, and guesses that are not too good.

The model, the experts' arithmetic and the loop are the same in all of them; only where records come from differs.
"""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.experts.job import F32, TEXT, Job, Outcome, drive
from refold.experts.paged import PagedModel

__all__ = ["Front", "Mapped", "run"]

U8 = NDArray[np.uint8]
KEPT = 64  # tokens whose routing is noted


class Mapped:
    """Records by the page cache alone: the bundle is mapped, the kernel reads and evicts."""

    def __init__(self, model: PagedModel) -> None:
        self._index, self._at = model.index, model.records_at
        with Path(model.path).open("rb") as f:
            self._map = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[list[int], list[U8]]]:
        where = [self._index[layer, e] for e in experts]
        yield list(experts), [self._bytes[self._at + r.offset : self._at + r.offset + r.size] for r in where]

    def hint(self, layer: int, experts: Sequence[int], confidence: Sequence[float] | None = None) -> None:
        """The kernel is told nothing."""


class Front:
    """What the model sees of a pager: it notes the routing, and makes hints wrong on purpose.

    In a routing-controlled model nothing changes a router's dimensions of the residual stream before it runs, so that looking
    ahead would always be right. On real models it is right for 72 to 87 % (docs/benchmarks.md), so each hinted expert is
    exchanged for another one with the probability 1 - recall.
    """

    def __init__(self, records: Any, experts: int, recall: float, seed: int = 0) -> None:
        self.records, self._experts, self._recall, self._draw = records, experts, recall, random.Random(seed)
        self.routing: list[list[list[int]]] = []

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[list[int], list[U8]]]:
        self.routing[-1].append(list(experts))
        waves: Iterator[tuple[list[int], list[U8]]] = self.records.waves(layer, experts)
        return waves

    def hint(self, layer: int, experts: Sequence[int], confidence: Sequence[float] | None = None) -> None:
        others = [e for e in range(self._experts) if e not in experts]
        self._draw.shuffle(others)
        told = [others.pop() if others and self._draw.random() >= self._recall else e for e in experts]
        self.records.hint(layer, told, confidence)


def run(job: Job) -> Outcome:
    """Options: mapped (page cache instead of the pager); policy, ahead (experts hinted for the next layer), recall, paths (read
    ahead along paths), learnt (with a path table that has seen the calibration tokens), warm (the most frequent experts
    first); threads (that compute); everything (read all before the clock starts); routing."""
    import torch

    from edge.experts import kernel
    from edge.experts.implementation import Paging
    from edge.experts.kernel.crew import Crew
    from edge.experts.model_build import build
    from edge.experts.pager import Pager, PagerSettings

    torch.set_num_threads(1)
    crew = Crew.of(int(job.options.get("threads", 1)))
    started = time.perf_counter()
    model = PagedModel.open(job.model)
    g, ahead, pager = model.index.geometry, int(job.options.get("ahead", 0)), None
    records: Any = Mapped(model)
    if not job.options.get("mapped"):
        settings = PagerSettings(
            policy=str(job.options.get("policy", PagerSettings().policy)),
            ahead=bool(ahead or job.options.get("paths")),
            paths="beside" if job.options.get("learnt") else "off",
            warm=bool(job.options.get("warm", True)),
        )
        pager = records = Pager.open(model, job.budget, settings)
        if pager.paths is not None:
            pager.paths.file = None  # every run begins with what the calibration tokens taught, and none leaves more behind
    front = Front(records, g.experts, float(job.options.get("recall", 1.0)))
    paging = Paging(front, g, crew)
    net = build(model.config, model.resident_tensors(), paging, job.model, ahead=ahead, halves=kernel.is_native())
    if pager is not None and job.options.get("everything"):
        for layer in g.layers:
            for _ in pager.waves(layer, range(g.experts)):
                pass
    step = _stepping(net, pager, front)
    before: list[Any] = []
    load = time.perf_counter() - started
    out = drive(job, step, int(net.config.vocab_size), load, lambda: before.append(pager and pager.counters))
    out.routing = front.routing if job.options.get("routing") else []
    out.details["kernel"] = kernel.name
    if pager is not None:
        _count(out, before[0], pager.counters)
        out.slots = job.budget // int(pager.cache.sizes.max())
        pager.close()
    if crew is not None:
        crew.close()
    return out


def _stepping(net: Any, pager: Any, front: Front) -> Any:
    import torch
    from transformers import DynamicCache

    state = {"cache": DynamicCache(config=net.config), "length": 0}

    def step(word: int) -> F32:
        if state["length"] == TEXT:
            state["cache"], state["length"] = DynamicCache(config=net.config), 0
        state["length"] += 1
        front.routing = [*front.routing[-KEPT:], []]
        with torch.inference_mode():
            out = net(input_ids=torch.tensor([[word]]), cache=state["cache"], use_cache=True, logits_to_keep=1)
        if pager is not None:
            pager.token()
        logits: F32 = out.logits[0, -1].numpy()
        return logits

    return step


def _count(out: Outcome, before: Any, after: Any) -> None:
    """What the pager counted while the clock ran."""
    asked = after.asked - before.asked
    out.hits, out.stall = after.hits - before.hits, after.stall_seconds - before.stall_seconds
    out.misses, out.cached = asked - out.hits, after.resident_bytes
    out.details |= {
        "covered": after.covered - before.covered, "late": after.late - before.late,
        "ahead useful": after.ahead_useful - before.ahead_useful, "ahead wasted": after.ahead_wasted - before.ahead_wasted,
        "wasted bytes": after.ahead_wasted_bytes - before.ahead_wasted_bytes,
        "busy seconds": round(after.busy_seconds - before.busy_seconds, 4),
    }  # fmt: skip
