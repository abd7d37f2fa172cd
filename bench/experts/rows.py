"""From runs to rows: medians over a line's runs, and what the physics of the machine permits beside them.

hit         resident before its layer asked, and not by read-ahead of the same token; of what was asked for
belady      the same of the policy that knows the future, with as many slots, on the words of the same runs
memory %    bytes that did not come from the disk, of the bytes of the experts used: for every engine, the kernel's cache too
compute     the time of the same engine with all experts in memory, and time / compute what paging costs beside it
reading     bytes read / the disk's rate around the run, a token: no bound, because a virtual disk's host may have in its own
            memory what the random reads of the rate did not find there
promise     anonymous memory of the process beyond what it takes besides experts ("own", measured without a cap), over the
            bytes for experts that it was given (--memory)
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np

from bench.experts.checkpoint import Words
from bench.experts.job import Outcome
from bench.experts.lines import Line, Plan
from bench.experts.measure import Run, by_line
from bench.experts.replayed import clairvoyant
from bench.result import Cell

__all__ = ["COLUMNS", "row", "rows"]

COLUMNS = ["engine", "cap %", "bits", "tokens/s", "p50 ms", "hit", "hit / belady", "memory %", "MB/token", "stall ms"]
COLUMNS += ["time / compute", "promise", "peak MB", "OOM", "note"]  # the rest is in the JSON


def rows(runs: list[Run], words: Words, plan: Plan) -> list[dict[str, Cell]]:
    grouped = by_line(runs)
    compute = {(line.name, line.bits): _compute(rs) for line, rs in grouped if line.share is None}
    return [row(line, rs, words, plan, compute.get((line.ceiling, line.bits))) for line, rs in grouped]


def _compute(runs: list[Run]) -> float | None:
    times = [median(r.outcome.times) for r in runs if r.outcome is not None]
    return median(times) if times else None


def row(line: Line, runs: list[Run], words: Words, plan: Plan, compute: float | None) -> dict[str, Cell]:
    """`compute`: seconds a token of the line's ceiling; None: not measured, then time without stall."""
    out: dict[str, Cell] = {
        "engine": line.name, "cap %": None if line.share is None else 100 * line.share, "bits": line.bits,
        "runs": len(runs), "cap MB": _mb(runs[0].cap) or None,
    }  # fmt: skip
    ended = [r.finished for r in runs if r.finished is not None]
    peak = max((f.peak for f in ended), default=0)
    out["peak MB"], out["OOM"] = _mb(peak), sum(f.killed for f in ended)
    out["anonymous MB"] = _mb(max((f.anonymous for f in ended), default=0))
    out["note"] = next((r.note for r in runs if r.note), "")
    good = [r for r in runs if r.outcome is not None]
    if not good:
        return out

    def middle(what: Callable[[Run], float]) -> float:
        return float(f"{median(what(r) for r in good):.5g}")

    shape = words.shape
    asked = shape.layers * shape.top_k * plan.tokens
    out |= {
        "tokens/s": middle(lambda r: len(_times(r)) / sum(_times(r))),
        "p50 ms": middle(lambda r: 1e3 * float(np.percentile(_times(r), 50))),
        "p95 ms": middle(lambda r: 1e3 * float(np.percentile(_times(r), 95))),
        "MB/token": middle(lambda r: _read(r) / 1e6),
        "memory %": middle(lambda r: 100 * (1 - _read(r) / (asked / plan.tokens * shape.record(line.bits)))),
        "disk MB/s": middle(lambda r: r.rate / 1e6),
        "reading ms": middle(lambda r: 1e3 * _read(r) / r.rate if r.rate else 0.0),
        "time / compute": middle(lambda r: sum(_times(r)) / len(_times(r)) / (compute or _computing(r))),
        "compute ms": middle(lambda r: 1e3 * (compute or _computing(r))),
        "load s": middle(lambda r: _of(r).load_seconds),
        "VmHWM MB": middle(lambda r: _of(r).status["VmHWM"] * 1.024e-3),
        "right %": middle(lambda r: 100 * _of(r).right / len(_times(r))),
    }  # fmt: skip
    if line.kind == "paged" and line.budget(shape) and line.share is not None:
        out |= {
            "promise": max(_promise(r, line.budget(shape)) for r in good), "own MB": _mb(good[0].own),
            "hit": middle(_hit), "stall ms": middle(lambda r: 1e3 * _of(r).stall / len(_times(r))),
            "belady": middle(lambda r: _belady(r, words, plan)),
            "hit / belady": middle(lambda r: _hit(r) / _belady(r, words, plan)),
            "covered": middle(lambda r: float(_of(r).details["covered"]) / asked), "slots": _of(good[0]).slots,
            "wasted MB/token": middle(lambda r: float(_of(r).details["wasted bytes"]) / 1e6 / plan.tokens),
        }  # fmt: skip
    elif line.share is not None and compute is not None:
        out["stall ms"] = middle(lambda r: 1e3 * max(0.0, sum(_times(r)) / len(_times(r)) - compute))
    return out


def _of(run: Run) -> Outcome:
    assert run.outcome is not None
    return run.outcome


def _times(run: Run) -> list[float]:
    return _of(run).times


def _read(run: Run) -> float:
    return float(_of(run).read) / len(_times(run))


def _hit(run: Run) -> float:
    out = _of(run)
    return float(out.hits) / max(1, out.hits + out.misses)


def _computing(run: Run) -> float:
    """Where no ceiling was measured: what a token took without waiting."""
    return (sum(_times(run)) - max(0.0, _of(run).stall)) / len(_times(run))


def _promise(run: Run, budget: int) -> float:
    return round((1024 * _of(run).status["RssAnon"] - run.own) / budget, 4)


def _belady(run: Run, words: Words, plan: Plan) -> float:
    part = words.trace[run.first : run.first + plan.warm + plan.tokens]
    return clairvoyant(part, words.shape, _of(run).slots, plan.warm)


def _mb(size: int) -> float:
    return round(size / 1e6, 1)
