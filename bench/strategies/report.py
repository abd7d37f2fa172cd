"""From pieces to a table, claims, the default the table names, and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

from bench.kept import best_of
from bench.result import Cell, Claim, Result, number
from bench.strategies.pieces import Piece
from bench.strategies.rows import STATISTICS, Row, Scale
from cloud.distil import DistilSettings

__all__ = ["best_rate", "build", "claims", "plot"]


def best_rate(row: str, pieces: list[Piece]) -> float:
    """The rate with the best mean over these pieces. Raises ValueError where the row was not run."""
    return best_of((p.work.rate, p.accuracy) for p in pieces if p.work.row == row)


def build(
    rows: list[Row], rates: dict[str, float], pieces: list[Piece], scale: Scale, *, seed: int = 0, quick: bool = False
) -> Result:
    """One line a row, best on the development half first."""
    table: list[dict[str, Cell]] = []
    for row in rows:
        mine = [p for p in pieces if p.work.row == row.name and p.work.rate == rates[row.name]]
        developed = {p.work.corruption: p for p in mine if p.work.corruption in scale.development}
        reported = {p.work.corruption: p for p in mine if p.work.corruption in scale.report}
        shares = [p.share for p in mine if not math.isnan(p.share)]
        line: dict[str, Cell] = {
            "row": row.name,
            "recipe": row.recipe,
            "modifiers": ", ".join(row.modifiers),
            "rate": rates[row.name] or None,
            "development": round(mean(p.accuracy for p in developed.values()), 2),
            "report": round(mean(p.accuracy for p in reported.values()), 2),
            "exported": round(mean(p.exported for p in reported.values()), 2),
            "share": round(mean(shares), 2) if shares else None,
            "s/training": round(mean(p.seconds for p in mine), 1),
        }
        line |= {name: p.accuracy for name, p in reported.items()}
        line |= {f"{name} (development)": p.accuracy for name, p in developed.items()}
        tried: dict[float, list[float]] = {}
        for p in pieces:
            if p.work.row == row.name and p.work.corruption in scale.tuning:
                tried.setdefault(p.work.rate, []).append(p.accuracy)
        if len(tried) > 1:
            line |= {f"tuning at {rate:g}": round(mean(found), 2) for rate, found in sorted(tried.items())}
        table.append(line)
    table.sort(key=lambda line: -number(line["development"]))
    best = next((line for line in table if line["recipe"] != STATISTICS), None)
    settings: dict[str, object] = {
        "student": "ResNet-20, int8",
        "severity": 5,
        "development": {"corruptions": scale.development, "tuning": scale.tuning, "seed": scale.development_seed},
        "report": {"corruptions": scale.report, "seed": seed},
        "uploads": scale.uploads,
        "judged": scale.judged,
        "rates": scale.tried,
        "distil": scale.distil,
        "options": {r.name: r.options for r in rows if r.options},
        "best on the development half": best["row"] if best else None,
        "default": DistilSettings().recipe,
    }
    columns = ["row", "rate", "development", "report", *scale.report, "share", "s/training"]
    return Result("strategies", table, claims(table), columns, settings, quick)


def claims(table: list[dict[str, Cell]]) -> list[Claim]:
    """Whether the default is what the table names, and what it is worth. A number that was not measured holds nothing."""
    default = next((line for line in table if line["row"] == DistilSettings().recipe), {})
    statistics = next((line for line in table if line["row"] == STATISTICS), {})
    others = [line for line in table if line["row"] not in (DistilSettings().recipe, STATISTICS)]
    best = max(others, key=lambda line: number(line["development"]), default={})

    def lead(line: dict[str, Cell], over: dict[str, Cell], column: str) -> float:
        return round(number(line.get(column)) - number(over.get(column)), 2)

    name, other = str(default.get("row", "not run")), str(best.get("row", "none"))
    return [
        Claim(
            "strategies.default",
            f"the default ({name}) above the best other row ({other}), development half",
            lead(default, best, "development"),
            "≥",
            0.0,
            unit=" points",
        ),
        Claim(
            "strategies.report",
            f"the default ({name}) above the same row ({other}), report half",
            lead(default, best, "report"),
            "≥",
            0.0,
            unit=" points",
        ),
        Claim(
            "strategies.gain",
            f"the default ({name}) above the domain's statistics alone, report half",
            lead(default, statistics, "report"),
            "≥",
            1.0,
            unit=" points",
        ),
    ]


def plot(result: Result, path: Path) -> None:
    """Mean accuracy of each row on the report half (bars) and on the development half (marks)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(result.rows, key=lambda line: number(line["report"]))
    default = result.settings.get("default")
    names = [str(line["row"]) for line in rows]
    colours = ["#1f6feb" if n == default else "#d9b44a" if n == STATISTICS else "#8a8f98" for n in names]
    figure, axis = pyplot.subplots(figsize=(9, 0.34 * len(rows) + 1.6), layout="constrained")
    axis.barh(names, [number(line["report"]) for line in rows], color=colours, label="report half")
    axis.plot([number(line["development"]) for line in rows], names, "D", color="black", markersize=4, label="development half")
    values = [number(line[c]) for line in rows for c in ("report", "development")]
    axis.set_xlim(max(0, min(values, default=0) - 5), min(100, max(values, default=100) + 2))
    axis.set_xlabel("int8 accuracy on images that were not uploaded, mean over corruptions, %")
    axis.legend(loc="lower right")
    axis.set_title(f"Cloud strategies on the same {result.settings.get('uploads')} uploads{' (quick)' if result.quick else ''}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
