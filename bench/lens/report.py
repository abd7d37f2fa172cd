"""From pieces to a table, claims and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, variance

from bench.kept import best_of
from bench.lens.candidates import NORMS, Candidate
from bench.lens.cases import DECIDING, Scale
from bench.lens.compute import NETS, cost
from bench.lens.pieces import Piece
from bench.result import Cell, Claim, Result, number
from cloud.distil import DistilSettings

__all__ = ["BOTH", "best_rate", "build", "claims", "gain", "plot"]

BOTH = "teachers, mean of both"  # the row that decides
BAR, MOST = 0.8, {"ResNet-20": 3.0, "Lite0": 1.0}  # points; multiply-adds in %: issue 12, item 6
Scores = dict[tuple[str, int], float]  # corruption and seed to accuracy in %, or to a difference of two


def best_rate(candidate: str, pieces: list[Piece]) -> float:
    """The rate with the best mean over these pieces. Raises ValueError where the candidate was not run."""
    return best_of((p.work.rate, p.accuracy) for p in pieces if p.work.candidate == candidate)


def gain(differences: Scores) -> tuple[float, float]:
    """Mean over corruptions and seeds, and its standard error over seeds: corruptions are fixed, seeds are drawn.

    Each corruption's mean over n seeds has the variance s²/n; the mean of C of them sqrt(Σ s²/n) / C. NaN at one seed.
    """
    by_corruption: dict[str, list[float]] = {}
    for (corruption, _), value in differences.items():
        by_corruption.setdefault(corruption, []).append(value)
    groups = list(by_corruption.values())
    if not groups:
        return math.nan, math.nan
    if min(len(g) for g in groups) < 2:
        return mean(differences.values()), math.nan
    return mean(mean(g) for g in groups), math.sqrt(sum(variance(g) / len(g) for g in groups)) / len(groups)


def build(
    chosen: list[Candidate],
    rates: dict[str, float],
    pieces: list[Piece],
    scale: Scale,
    *,
    seeds: list[int],
    quick: bool = False,
) -> Result:
    """One line for each case and candidate; norms alone first."""

    def mine(candidate: str, cases: list[str]) -> list[Piece]:
        return [
            p
            for p in pieces
            if (p.work.candidate, p.work.rate) == (candidate, rates[candidate])
            and p.work.case in cases
            and p.work.corruption in scale.report
        ]

    rows = [(case.name, [case.name]) for case in scale.cases]
    deciding = [c.name for c in scale.cases if c in DECIDING]
    rows.insert(len(deciding), (BOTH, deciding))
    table: list[dict[str, Cell]] = []
    for title, cases in rows:
        base = _scores(mine(NORMS, cases))
        for name in [NORMS, *(c.name for c in chosen)]:
            done = mine(name, cases)
            if done:
                table.append(_line(title, name, rates[name], done, base, scale))
    tried = {
        c.name: {
            f"{rate:g}": round(mean(p.accuracy for p in found), 2)
            for rate in scale.rates
            if (found := [p for p in pieces if (p.work.candidate, p.work.rate) == (c.name, rate) and _developing(p, scale)])
        }
        for c in chosen
    }
    alone = [p.accuracy for p in pieces if p.work.candidate == NORMS and _developing(p, scale)]
    settings: dict[str, object] = {
        "student": "ResNet-20, fake-quantised",
        "severity": 5,
        "report": {"corruptions": scale.report, "seeds": seeds},
        "development": {
            "corruptions": scale.development,
            "seed": scale.development_seed,
            "accuracy by rate": tried,
            NORMS: round(mean(alone), 2) if alone else None,
        },
        "judged": scale.judged,
        "distil": scale.distil,
        "steps": DistilSettings.of(scale.distil).steps,
    }
    columns = ["case", "row", "rate", "mean", "gain", "± (standard error)", *scale.report, "share", "numbers"]
    return Result("lens", table, claims(table, [c.name for c in chosen]), columns, settings, quick)


def _developing(piece: Piece, scale: Scale) -> bool:
    return piece.work.corruption in scale.development and piece.work.seed == scale.development_seed


def _scores(pieces: list[Piece]) -> Scores:
    """Accuracy for each corruption and seed, mean over cases."""
    found: dict[tuple[str, int], list[float]] = {}
    for p in pieces:
        found.setdefault((p.work.corruption, p.work.seed), []).append(p.accuracy)
    return {key: mean(values) for key, values in found.items()}


def _line(title: str, name: str, rate: float, done: list[Piece], base: Scores, scale: Scale) -> dict[str, Cell]:
    scores = _scores(done)
    line: dict[str, Cell] = {"case": title, "row": name, "rate": rate or None, "mean": round(mean(scores.values()), 2)}
    differences = {key: value - base[key] for key, value in scores.items() if key in base}
    if name != NORMS:
        value, error = gain(differences)
        line |= {"gain": round(value, 2), "± (standard error)": None if math.isnan(error) else round(error, 2)}
    for corruption in scale.report:
        found = [v for (c, _), v in scores.items() if c == corruption]
        line[corruption] = round(mean(found), 2) if found else None
        apart = [v for (c, _), v in differences.items() if c == corruption]
        if name != NORMS and apart:
            line[f"{corruption}: gain"] = round(mean(apart), 2)
    line |= {
        "share": round(mean(p.share for p in done), 2),
        "restyled": round(mean(p.restyled for p in done), 2),
        "s/training": round(mean(p.seconds for p in done), 1),
    }
    if name != NORMS:
        line["numbers"] = cost(name, "ResNet-20").numbers
        line |= {f"{net} + %": cost(name, net).share for net in NETS}
    return line


def claims(table: list[dict[str, Cell]], names: list[str]) -> list[Claim]:
    """Whether a candidate is worth its place. A number that was not measured holds nothing."""
    out = []
    for name in names:
        line = next((x for x in table if (x["case"], x["row"]) == (BOTH, name)), {})
        apart = [number(v) for column, v in line.items() if column.endswith(": gain")]
        out += [
            Claim(
                f"{name}.gain",
                f"{name} above norms alone, teachers' predictions, mean of corruptions, seeds and both numbers of uploads",
                number(line.get("gain")),
                "≥",
                BAR,
                unit=" points",
            ),
            Claim(
                f"{name}.least",
                f"{name} above norms alone, the corruption with the least",
                min(apart, default=math.nan),
                "≥",
                0.0,
                unit=" points",
            ),
        ]
        out += [
            Claim(f"{name}.compute.{net}", f"{name}: multiply-adds added to {net}", cost(name, net).share, "≤", most, unit=" %")
            for net, most in MOST.items()
        ]
    return out


def plot(result: Result, path: Path) -> None:
    """Gain over norms alone for each case, with standard errors, and the bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in result.rows if line["row"] != NORMS][::-1]
    names = [f"{line['row']}: {line['case']}" for line in lines]
    colours = ["#1f6feb" if line["case"] == BOTH else "#8a8f98" for line in lines]
    errors = [0.0 if line["± (standard error)"] is None else number(line["± (standard error)"]) for line in lines]
    figure, axis = pyplot.subplots(figsize=(9, 0.4 * len(lines) + 1.8), layout="constrained")
    axis.barh(names, [number(line["gain"]) for line in lines], xerr=errors, color=colours, capsize=3)
    axis.axvline(BAR, color="#d9b44a", label=f"bar: {BAR} points (blue decides)")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("points above norms alone, mean over corruptions and seeds, ± standard error")
    axis.legend(loc="lower right")
    axis.set_title(f"What a release could carry beside norms{' (quick)' if result.quick else ''}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
