"""From pieces to a table, claims and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from bench.adaptation.jobs import Piece
from bench.adaptation.rows import Row
from bench.result import Cell, Claim, Result

__all__ = ["build", "claims", "plot"]

NOT_RUN = math.nan


def build(rows: list[Row], pieces: list[Piece], settings: dict[str, object], *, quick: bool = False) -> Result:
    """One line for each row and protocol; the accuracy of every stream is a column of the JSON."""
    table: list[dict[str, Cell]] = []
    for protocol in ("reset", "continual", "long"):
        for row in rows:
            found = [p for p in pieces if p.row == row.name and p.protocol == protocol]
            shifted = [p for p in found if p.stream != "clean"]
            if not shifted:
                continue
            frames = sum(p.frames for p in found)
            line: dict[str, Cell] = {
                "protocol": protocol,
                "row": row.name,
                "kind": row.kind,
                "precision": row.precision,
                "settings": row.settings,
                "mean": round(mean(p.accuracy for p in shifted), 2),
                "last quarter": round(mean(p.last_quarter for p in shifted), 2),
                "clean": next((round(p.accuracy, 2) for p in found if p.stream == "clean"), None),
                "uploaded %": round(100 * sum(p.frames_uploaded for p in found) / frames, 2),
                "up B/frame": round(sum(p.bytes_up for p in found) / frames, 1),
                "down B/frame": round(sum(p.bytes_down for p in found) / frames, 1),
                "ms/frame": round(1000 * sum(p.seconds for p in found) / frames, 2),
            }
            line.update({p.stream: round(p.accuracy, 2) for p in found})
            line.update({f"{p.stream} last quarter": round(p.last_quarter, 2) for p in found})
            line.update({f"{p.stream} uploaded": p.frames_uploaded for p in found})
            table.append(line)
    shown = ["row", "protocol", "precision", "mean", "last quarter", "clean", "uploaded %", "up B/frame", "down B/frame"]
    streams = list(dict.fromkeys(p.stream for p in pieces if p.protocol == "reset" and p.stream != "clean"))
    if len(streams) <= 4:
        shown += streams
    return Result("adaptation", table, claims(rows, pieces), shown, settings, quick)


def claims(rows: Iterable[Row], pieces: Iterable[Piece]) -> list[Claim]:
    """Refold against the best baseline row of each protocol. A number that was not measured is NaN and holds nothing."""
    pieces = list(pieces)
    kinds = {r.name: r.kind for r in rows}

    def accuracy(row: str, protocol: str, *, last_quarter: bool = False) -> dict[str, float]:
        found = [p for p in pieces if p.row == row and p.protocol == protocol]
        return {p.stream: p.last_quarter if last_quarter else p.accuracy for p in found}

    def shifted_mean(row: str, protocol: str, *, last_quarter: bool = False) -> float:
        values = [v for s, v in accuracy(row, protocol, last_quarter=last_quarter).items() if s != "clean"]
        return mean(values) if values else NOT_RUN

    out = []
    for protocol, title, late, bar in (
        ("reset", "reset for each corruption, mean accuracy", False, 1.5),
        ("continual", "continual, mean accuracy", False, 1.5),
        ("long", "long streams, last quarter", True, 3.0),
    ):
        means = {r: shifted_mean(r, protocol, last_quarter=late) for r, k in kinds.items() if k == "baseline"}
        measured = {r: m for r, m in means.items() if not math.isnan(m)}
        best = max(measured, key=lambda r: measured[r]) if measured else ""
        if protocol == "long" and not measured:
            continue
        ours = shifted_mean("refold", protocol, last_quarter=late)
        text = f"Refold int8 above the best baseline of any precision ({best or 'none was run'}), {title}"
        gain = round(ours - measured[best], 2) if measured else NOT_RUN
        out.append(Claim(f"adaptation.{protocol}.gain", text, gain, "≥", bar, 4.0, " points"))
    overlay, distilled, labels = (
        accuracy(row, "long", last_quarter=True) for row in ("refold-overlay", "refold", "refold-labels")
    )
    common = [s for s in distilled if s in overlay and s in labels]
    room = sum(labels[s] - overlay[s] for s in common)
    gained = sum(distilled[s] - overlay[s] for s in common)
    if common:
        share = round(100 * gained / room, 1) if room > 0 else NOT_RUN
        out.append(
            Claim(
                "adaptation.long.distillation",
                "of what true labels on the same uploads add to the overlay, distillation keeps (long streams, last quarter)",
                share,
                "≥",
                50.0,
                80.0,
                " %",
            )
        )
    uploads = [p for p in pieces if p.row == "refold"]
    out.append(
        Claim(
            "adaptation.uploads",
            "frames Refold uploads, of all frames of any protocol",
            round(100 * sum(p.frames_uploaded for p in uploads) / max(1, sum(p.frames for p in uploads)), 2)
            if uploads
            else NOT_RUN,
            "≤",
            15.0,
            5.0,
            " %",
        )
    )
    source, refold = accuracy("source", "reset"), accuracy("refold", "reset")
    gaps = [refold[s] - source[s] for s in refold if s in source]
    out.append(
        Claim(
            "adaptation.worst",
            "Refold against the frozen source where it does worst, any corruption or clean",
            round(min(gaps), 2) if gaps else NOT_RUN,
            "≥",
            -1.0,
            None,
            " points",
        )
    )
    return out


def plot(result: Result, path: Path) -> None:
    """Left: mean accuracy of each row under each protocol. Right: every corruption, source, best baseline and Refold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"baseline": "#8a8f98", "bound": "#d9b44a", "refold": "#1f6feb"}
    figure, axes = pyplot.subplots(1, 2, figsize=(15, 6), width_ratios=(1, 1.5), layout="constrained")
    reset = [r for r in result.rows if r["protocol"] == "reset"]
    left, right = axes
    names = [str(r["row"]) for r in reset]
    left.barh(names, [float(r["mean"] or 0) for r in reset], color=[colours[str(r["kind"])] for r in reset])
    for protocol, marker in (("continual", "D"), ("long", "o")):
        found = {str(r["row"]): float(r["mean"] or 0) for r in result.rows if r["protocol"] == protocol}
        left.plot(list(found.values()), list(found), marker, color="black", label=protocol, markersize=5)
    left.invert_yaxis()
    left.set_xlabel("online accuracy, mean over corruptions, % (bars: reset)")
    if left.get_legend_handles_labels()[0]:
        left.legend()
    streams = [s for s in result.settings.get("streams", []) if isinstance(s, str)]  # type: ignore[attr-defined]
    baselines = [r for r in reset if r["kind"] == "baseline" and r["row"] != "source"]
    chosen = [r for r in reset if r["row"] in ("source", "refold-overlay", "refold")]
    if baselines:
        chosen.insert(1, max(baselines, key=lambda r: float(r["mean"] or 0)))
    for i, row in enumerate(chosen):
        places = [x + 0.8 * (i - (len(chosen) - 1) / 2) / max(1, len(chosen)) for x in range(len(streams) + 1)]
        values = [float(row.get(s) or 0) for s in (*streams, "clean")]
        right.bar(places, values, 0.8 / len(chosen), label=f"{row['row']} ({row['precision']})")
    right.set_xticks(range(len(streams) + 1), [*(s.replace("_", " ") for s in streams), "clean"], rotation=45, ha="right")
    right.set_ylabel("online accuracy, %")
    right.legend(loc="lower right")
    figure.suptitle(f"CIFAR-10-C severity 5, ResNet-20 student{' (quick)' if result.quick else ''}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
