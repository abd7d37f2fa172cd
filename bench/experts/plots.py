"""Three pictures in one file: tokens/s over memory, hit rate over slots, where a token's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.experts.lines import LLAMA, OURS
from bench.result import Result, number

__all__ = ["plot"]

NAMES = (OURS, LLAMA, "llama.cpp, refold's total", "mmap, our kernels", "EdgeMoE (fp32 cache)")


def plot(result: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    _speed(axes[0], result)
    _hits(axes[1], result)
    _time(axes[2], result)
    figure.suptitle(f"Experts that do not fit{' (quick)' if result.quick else ''}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _speed(axis: Any, result: Result) -> None:
    rows = [r for r in result.rows if r.get("bits") == 4 and r.get("tokens/s")]
    for name in NAMES:
        points = sorted((number(r["cap MB"]), number(r["tokens/s"])) for r in rows if r["engine"] == name and r.get("cap MB"))
        if points:
            axis.plot([p[0] for p in points], [p[1] for p in points], "o-", label=name)
    for name, style in ((f"{OURS}, all in memory", "--"), (f"{LLAMA}, all in memory", ":")):
        for r in rows:
            if r["engine"] == name:
                axis.axhline(number(r["tokens/s"]), linestyle=style, color="grey", linewidth=0.9, label=name)
    axis.set(xlabel="cap, MB (experts, resident part, allowance)", ylabel="tokens/s", title="speed over memory, 4 bits")
    if axis.lines:
        axis.legend(fontsize=7)


def _hits(axis: Any, result: Result) -> None:
    """Replay of the trace, no model involved; dots are what the runs measured."""
    replayed: Any = result.settings.get("replay", [])
    for policy in dict.fromkeys(str(r["policy"]) for r in replayed):
        points = sorted((number(r["slots"]), number(r["hit"])) for r in replayed if r["policy"] == policy)
        style = {"belady": "k--", "informed": "k:"}.get(policy, "-")
        axis.plot([p[0] for p in points], [p[1] for p in points], style, label=policy, linewidth=1.2)
    ours = [(number(r["slots"]), number(r["hit"])) for r in result.rows if r.get("engine") == OURS and r.get("slots")]
    axis.plot([p[0] for p in ours], [p[1] for p in ours], "o", color="black", label=f"{OURS}, measured")
    axis.set(xlabel="slots (all layers share them)", ylabel="strict hit rate", title="hit rate over slots", ylim=(0, 1))
    axis.legend(fontsize=7)


def _time(axis: Any, result: Result) -> None:
    rows = [r for r in result.rows if r.get("compute ms") and r.get("bits") == 4 and r.get("cap %") in (None, 25.0)]
    names = [str(r["engine"]) for r in rows]
    whole = [1e3 / number(r["tokens/s"]) for r in rows]
    stall = [min(number(r["stall ms"]) if r.get("stall ms") is not None else 0.0, w) for r, w in zip(rows, whole, strict=True)]
    axis.barh(names, [w - s for w, s in zip(whole, stall, strict=True)], label="computing")
    axis.barh(names, stall, left=[w - s for w, s in zip(whole, stall, strict=True)], label="waiting for the disk")
    for i, r in enumerate(rows):
        axis.plot([number(r["compute ms"])] * 2, [i - 0.4, i + 0.4], color="black", linewidth=1.2)
    axis.set(xlabel="ms a token; black: with all in memory", title="where the time goes, 25 % and all in memory")
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    if rows:
        axis.legend(fontsize=7)
