"""Pictures of a training and of a search, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refold.atomic import write_atomically

__all__ = ["loss_curve", "pareto", "predicted_against_measured"]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    write_atomically(path, [out.getvalue()])


def loss_curve(path: Path, losses: Sequence[Sequence[float]]) -> None:
    """losses: (steps, subnets + 1): high, random, ..., low, regularisation."""
    figure, axes = _axes(8, 4.5)
    held = np.asarray(losses)
    names = ["high", *(["random"] * (held.shape[1] - 3)), "low", "regularisation"]
    window = max(1, len(held) // 50)
    steps = np.arange(window, len(held) + 1)
    for column, name in zip(held.T, names, strict=True):
        line = axes.plot(np.arange(1, len(held) + 1), column, alpha=0.2)[0]
        smooth = np.convolve(column, np.ones(window) / window, "valid")
        axes.plot(steps, smooth, color=line.get_color(), label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"Elastic training (bold: mean of {window} steps)")
    axes.legend()
    _save(figure, path)


def pareto(path: Path, cost: str, points: Mapping[str, Sequence[tuple[float, float]]], budget: float | None = None) -> None:
    """Accuracy over cost. points: name of a group to (cost, accuracy) pairs."""
    figure, axes = _axes(7, 4.5)
    for name, pairs in points.items():
        xs, ys = np.asarray(pairs, float).reshape(-1, 2).T
        axes.scatter(xs, ys, s=12 if len(xs) > 30 else 40, label=name, alpha=0.4 if len(xs) > 30 else 1)
    every = sorted(p for pairs in points.values() for p in pairs)
    front: list[tuple[float, float]] = []
    for x, y in every:
        if not front or y > front[-1][1]:
            front.append((x, y))
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.8, label="Pareto front")
    if budget is not None:
        axes.axvline(budget, color="#d0342c", linestyle="--", label="budget")
    axes.set(xlabel=cost, ylabel="accuracy on held-out pictures")
    axes.legend()
    _save(figure, path)


def predicted_against_measured(path: Path, predicted: Sequence[float], measured: Sequence[float], title: str) -> None:
    figure, axes = _axes(5, 5)
    axes.scatter(measured, predicted, s=14)
    ends = [min(*measured, *predicted), max(*measured, *predicted)]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.set(xlabel="measured accuracy", ylabel="predicted", title=title)
    _save(figure, path)
