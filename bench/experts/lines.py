"""What is measured: one line for each engine, cap and bit-width, and the options that make it what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.experts.shape import Shape
from edge.experts.buffers import stride

__all__ = ["ALLOWANCE", "CAPS", "LLAMA", "LLAMA_RESIDENT", "OURS", "RECALL", "RESIDENT", "Line", "Plan", "plan"]

OURS, LLAMA, RESIDENT, LLAMA_RESIDENT = "refold", "llama.cpp", "refold, all in memory", "llama.cpp, all in memory"
CAPS = (0.5, 0.25, 0.125)
RECALL = 0.8  # of guesses: published look-ahead is right for 72 to 87 % (docs/benchmarks.md)
ALLOWANCE = {"OLMoE": 64 << 20, "quick": 16 << 20}  # page tables, libraries' pages, what a heap grows by
Options = Mapping[str, float | int | str | bool]


@dataclass(frozen=True)
class Line:
    """One row.

    Attributes:
        kind: "paged" (our runtime), "llama" or "accelerate". share: of all experts' bytes that are the cap; None: no cap.
        slots: how many records the pager may hold: "share" of them, "floor" (a layer's top k and one in flight), "all", or
            "fp32" (as many as would fit the share if they were decoded to float32, as EdgeMoE holds them).
        runs: how often. like: a line of the same cap whose total memory this one gets; "": what it needs itself.
        ceiling: the line without a cap whose time is this one's time to compute.
        short: (tokens before the clock, timed ones) of an engine that would take too long with the plan's; None: the plan's.
    """

    name: str
    kind: str
    share: float | None
    bits: int = 4
    slots: str = "share"
    runs: int = 1
    options: Options = field(default_factory=dict)
    like: str = ""
    ceiling: str = RESIDENT
    short: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        cap = "" if self.share is None else f" at {100 * self.share:g} %"
        return f"{self.name}{cap}, {self.bits} bits"

    @property
    def model(self) -> str:
        return {"llama": "gguf", "accelerate": "safetensors"}.get(self.kind, "bundle")

    def budget(self, shape: Shape) -> int:
        """Bytes for the pager's records; 0 where the kernel pages."""
        if self.kind != "paged" or self.options.get("mapped"):
            return 0
        each, rows = stride(shape.record(self.bits)), shape.geometry.shapes
        least = (shape.top_k + 1) * each
        if self.slots == "all":
            return shape.routed * each
        if self.slots == "floor" or self.share is None:
            return least
        held = self.share * shape.expert_bytes(self.bits)
        if self.slots == "fp32":
            return max(least, int(held // (4 * sum(r * c for r, c in rows))) * each)
        return max(least, int(held))


@dataclass(frozen=True)
class Plan:
    """All lines, in the order they run; tokens before the clock starts and timed ones."""

    lines: tuple[Line, ...]
    warm: int
    tokens: int


def plan(shape: Shape, quick: bool) -> Plan:
    ours: Options = {"ahead": 2 * shape.top_k, "recall": RECALL}
    everything: Options = {"everything": True, "policy": "lru"}
    demand: Options = {"policy": "lru", "warm": False}
    published: Options = {"policy": "edgemoe", "paths": True, "learnt": True}
    many, few, once = (1, 1, 1) if quick else (5, 3, 1)
    kernel = None if quick else (8, 16)  # what the kernel pages takes a second a token; steady after three
    lines = [
        Line(RESIDENT, "paged", None, slots="all", runs=few, options=everything),
        Line(LLAMA_RESIDENT, "llama", None, runs=few, ceiling=LLAMA_RESIDENT),
        Line(f"{LLAMA_RESIDENT}, repacked", "llama", None, runs=few, options={"repack": True}, ceiling=LLAMA_RESIDENT),
        Line(f"{RESIDENT}, two threads", "paged", None, slots="all", runs=few, options={**everything, "threads": 2}),
    ]
    for share in CAPS:
        most = many if share == 0.25 else few  # where the bar is
        lines += [
            Line(OURS, "paged", share, runs=many, options=ours),
            Line(LLAMA, "llama", share, runs=most, ceiling=LLAMA_RESIDENT, short=kernel),
            Line("llama.cpp, refold's total", "llama", share, runs=few, like=OURS, ceiling=LLAMA_RESIDENT, short=kernel),
        ]
        if share == 0.25 or not quick:
            lines += [
                Line("mmap, our kernels", "paged", share, runs=few, options={"mapped": True}, short=kernel),
                Line("EdgeMoE (fp32 cache)", "paged", share, slots="fp32", runs=once, options=published),
            ]
    lines += [
        Line("EdgeMoE's policy, packed", "paged", 0.25, runs=few, options=published),
        Line("on demand, no cache", "paged", 0.25, slots="floor", runs=few, options=demand),
        Line("on demand + look-ahead", "paged", 0.25, slots="floor", runs=few, options={**ours, "policy": "lru"}),
        Line("cache, no look-ahead", "paged", 0.25, runs=few),
        Line("on demand, no cache", "paged", 0.25, bits=8, slots="floor", runs=few, options=demand),
    ]
    if quick:
        lines.append(Line("accelerate, disk", "accelerate", 0.25, short=(1, 3), options={"layers": shape.layers}))
        return Plan(tuple(lines), warm=12, tokens=24)
    lines += [
        Line(RESIDENT, "paged", None, bits=8, slots="all", runs=few, options=everything),
        Line(LLAMA_RESIDENT, "llama", None, bits=8, runs=few, ceiling=LLAMA_RESIDENT),
        Line(OURS, "paged", 0.25, bits=8, runs=few, options=ours),
        Line(LLAMA, "llama", 0.25, bits=8, runs=few, ceiling=LLAMA_RESIDENT, short=kernel),
    ]
    return Plan(tuple(lines), warm=16, tokens=32)
