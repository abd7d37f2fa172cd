"""What an export of experts came to: a table, JSON, and the heat-map of bits."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.experts.search import Costs, Importance, Outcome
from refold.atomic import write_atomically
from refold.experts import BITS

__all__ = ["Searched", "Told", "heat_map", "lines"]

Key = tuple[int, int]


@dataclass(frozen=True)
class Searched:
    """Of a search. original: loss of the checkpoint, nats. uniform: loss with all experts at some bits. importance_by: what
    `found` was measured by, "loss" or "output".
    """

    costs: Costs
    original: float
    uniform: Mapping[int, float]
    found: Importance
    importance_by: str
    outcomes: Sequence[Outcome]
    taken: str
    evaluations: int
    resumed: int
    walk: Sequence[int] = ()  # evaluations of EdgeMoE's K moved by one, from none and from the middle: its "gradually"


@dataclass(frozen=True)
class Told:
    """Of an export. plan: bits by expert. perplexity, before: on the calibration text; None where no text was given."""

    path: Path
    digest: str
    bytes: int
    plan: Mapping[Key, int]
    record_bytes: int
    resident_bytes: int
    checkpoint_bytes: int
    seconds: float
    perplexity: float | None = None
    before: float | None = None
    frequency: Mapping[Key, float] = field(default_factory=dict)
    searched: Searched | None = None
    warnings: Sequence[str] = ()
    picture: Path | None = None

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "path": str(self.path), "digest": self.digest, "bytes": self.bytes, "record_bytes": self.record_bytes,
            "resident_bytes": self.resident_bytes, "checkpoint_bytes": self.checkpoint_bytes, "seconds": round(self.seconds, 1),
            "perplexity": self.perplexity, "perplexity_before": self.before,
            "bits": {f"{layer}.{e}": b for (layer, e), b in self.plan.items()},
            "frequency": {f"{layer}.{e}": round(f, 6) for (layer, e), f in self.frequency.items()},
            "warnings": list(self.warnings), "picture": str(self.picture) if self.picture else None,
        }  # fmt: skip
        if s := self.searched:
            out["search"] = {
                "taken": s.taken, "importance_by": s.importance_by, "evaluations": s.evaluations, "resumed": s.resumed,
                "importance_evaluations": s.found.evaluations, "edgemoe_k_one_at_a_time": list(s.walk),
                "uniform": {str(b): {"perplexity": math.exp(v), "bytes": s.costs.total(s.costs.uniform(b))}
                            for b, v in s.uniform.items()},
                "procedures": {
                    o.name: {
                        "perplexity": math.exp(o.loss), "bytes": s.costs.total(o.plan),
                        "bytes_read_per_token": round(s.costs.reads(o.plan)), "k": o.k, "k_measured": list(o.moved),
                        "evaluations": o.evaluations,
                    }
                    for o in s.outcomes
                },
                "importance": {
                    f"{layer}.{e}": {"harm_at_2": s.found.harm[layer, e], "help_at_8": s.found.help[layer, e]}
                    for layer, e in s.costs.keys
                },
            }  # fmt: skip
        return out


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    cells = [[c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in rows]
    return ["  ".join(row).rstrip() for row in cells]


def lines(told: Told) -> list[str]:
    """For a person."""
    counts = {b: sum(v == b for v in told.plan.values()) for b in BITS}
    out = [
        f"{told.path}  {told.bytes:,} bytes  digest {told.digest[:16]}  {told.seconds:.0f} s",
        f"experts: {told.record_bytes:,} bytes ({', '.join(f'{n} of {b} bits' for b, n in counts.items() if n)}); "
        f"always in memory: {told.resident_bytes:,} bytes; the checkpoint had {told.checkpoint_bytes:,}",
    ]
    if told.perplexity is not None and told.before is not None:
        out.append(
            f"perplexity on the calibration text: {told.before:.4f} before, {told.perplexity:.4f} after "
            f"({told.perplexity / told.before - 1:+.2%})"
        )
    if told.searched:
        out += ["", *_of_search(told.searched)]
    if told.picture:
        out += ["", f"bits by layer and expert: {told.picture}"]
    return out


def _of_search(s: Searched) -> list[str]:
    def row(name: str, loss: float, plan: Mapping[Key, int], asked: str) -> list[str]:
        change = math.expm1(loss - s.original)
        return [
            name,
            f"{math.exp(loss):.4f}",
            f"{change:+.2%}",
            f"{s.costs.total(plan):,}",
            f"{s.costs.reads(plan):,.0f}",
            asked,
        ]

    rows = [["", "perplexity", "change", "bytes", "bytes read/token", "evaluations"]]
    rows += [row(f"all at {b} bits", v, s.costs.uniform(b), "") for b, v in s.uniform.items()]
    rows += [row(o.name + (" (taken)" if o.name == s.taken else ""), o.loss, o.plan, str(o.evaluations)) for o in s.outcomes]
    out = _table(rows)
    again = f", {s.resumed} of them from the run before" if s.resumed else ""
    out.append(f"importance by {s.importance_by}: {s.found.evaluations} evaluations; in all {s.evaluations}{again}")
    if s.walk:
        own = next(o for o in s.outcomes if o.name == "edgemoe")
        out.append(
            f"EdgeMoE's order: K = {own.k} after {own.evaluations} evaluations by halving; moved one at a time it would be "
            f"{s.walk[0]} from none and {s.walk[1]} from the middle"
        )
    return out


def heat_map(path: Path, plan: Mapping[Key, int], frequency: Mapping[Key, float]) -> None:
    """Bits as colour, layers down, experts across; where measured, the share of a layer's tokens beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    layers = sorted({layer for layer, _ in plan})
    experts = 1 + max(e for _, e in plan)
    panels = 2 if frequency else 1
    figure, axes = pyplot.subplots(
        1,
        panels,
        figsize=(panels * (2 + min(0.25 * experts, 8)), 1.5 + min(0.3 * len(layers), 8)),
        layout="constrained",
        squeeze=False,
    )
    grid = np.array([[plan[layer, e] for e in range(experts)] for layer in layers])
    shown = axes[0, 0].imshow(
        grid, aspect="auto", cmap=ListedColormap(["#f4c95d", "#5aa9a3", "#2f4b7c"]), norm=BoundaryNorm([1, 3, 6, 9], 3)
    )
    bar = figure.colorbar(shown, ax=axes[0, 0], ticks=[2, 4.5, 7.5])
    bar.ax.set_yticklabels([f"{b} bits" for b in BITS])
    axes[0, 0].set_title("bits")
    if frequency:
        share = np.array([[frequency.get((layer, e), 0.0) for e in range(experts)] for layer in layers])
        figure.colorbar(axes[0, 1].imshow(share, aspect="auto", cmap="viridis"), ax=axes[0, 1])
        axes[0, 1].set_title("share of the layer's tokens")
    for ax in axes[0]:
        ax.set(xlabel="expert", ylabel="layer")
        ax.set_yticks(range(len(layers))[:: max(1, len(layers) // 24)], layers[:: max(1, len(layers) // 24)])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    write_atomically(path, [out.getvalue()])
