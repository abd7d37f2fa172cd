"""How close the CIFAR-10-C generator is to the authors' own code: 500 pictures of each corruption at severity 5, side by side.

The reference block was made with the published recipe and another seed, so drawn corruptions can only agree within sampling
error: an accuracy over 500 pictures has a standard deviation of about 2.2 points, a difference of two of them about 3 (the
pictures are the same ones, so a little less).
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray

from bench.adaptation.baselines import Source
from bench.adaptation.nets import Statistics
from bench.adaptation.rows import student, weights
from bench.corrupt import NAMES, corrupt
from bench.result import Cell, Claim, Options, Result, number, progress
from demo.images import load_u8

__all__ = ["plot", "run"]

U8 = NDArray[np.uint8]
COLOUR_BAR = 3.0  # of 255: twice the standard deviation for frost, whose textures differ most in brightness
ACCURACY_BAR = 7.0  # points; over twice the standard deviation of a difference, for the largest of thirty of them


def run(options: Options) -> Result:
    """Full and quick differ in how many draws of each corruption are averaged: five and one."""
    torch.set_num_threads(1)
    clean = load_u8(weights("cifar10_test.u8.xz"))[:500]
    labels = np.load(weights("cifar10_test_labels.npy"), allow_pickle=False)[:500].astype(np.int64)
    blocks = load_u8(weights("cifar10c_s5_15x500.u8.xz")).reshape(15, 500, 32, 32, 3)
    names = [n for n in NAMES if options.wants(n)]
    rows: list[dict[str, Cell]] = []
    with progress() as bar:
        task = bar.add_task("corruptions", total=len(names))
        for name in names:
            made = [corrupt(name, 5, clean, options.seed + i) for i in range(1 if options.quick else 5)]
            rows.append(_row(name, made, blocks[NAMES.index(name)], labels))
            bar.advance(task)
    claims = [
        Claim(
            "corruptions.accuracy",
            "largest difference of an accuracy (as is or BN-200) from the reference block's, any corruption",
            round(max(abs(number(r[k]) - number(r[f"{k}, block"])) for r in rows for k in ("source", "BN-200")), 2),
            "≤",
            ACCURACY_BAR,
            None,
            " points",
        ),
        Claim(
            "corruptions.mean-accuracy",
            "difference of the mean over corruptions of both accuracies",
            round(abs(mean(number(r[k]) - number(r[f"{k}, block"]) for r in rows for k in ("source", "BN-200"))), 2),
            "≤",
            1.0,
            None,
            " points",
        ),
        Claim(
            "corruptions.colour",
            "largest difference of a channel's mean, of 255",
            round(max(number(r["mean difference"]) for r in rows), 2),
            "≤",
            COLOUR_BAR,
        ),
    ]
    columns = ["corruption", "mean difference", "std difference", "sharpness", "same bytes %"]
    columns += ["source", "source, block", "BN-200", "BN-200, block"]
    return Result("corruptions", rows, claims, columns, {"pictures": 500, "severity": 5, "seed": options.seed}, options.quick)


def _row(name: str, made: list[U8], block: U8, labels: NDArray[np.int64]) -> dict[str, Cell]:
    def accuracy(images: U8, statistics: Statistics) -> float:
        predictions, _ = Source(student(), statistics, batch=200).run(images, labels)
        return 100 * float((predictions == labels).mean())

    def sharpness(images: U8) -> float:
        return float(np.abs(np.diff(images.astype(np.float32), axis=2)).mean())

    def distance(values: list[NDArray[np.float64]], reference: NDArray[np.float64]) -> float:
        return float(np.abs(np.mean(values, 0) - reference).max())

    row: dict[str, Cell] = {
        "corruption": name,
        "mean difference": round(distance([m.mean((0, 1, 2)) for m in made], block.mean((0, 1, 2))), 2),
        "std difference": round(distance([m.std((0, 1, 2)) for m in made], block.std((0, 1, 2))), 2),
        "sharpness": round(mean(sharpness(m) for m in made) / sharpness(block), 3),
        "same bytes %": round(100 * mean(float((m == block).mean()) for m in made), 1),
    }
    for title, statistics in (("source", Statistics.SOURCE), ("BN-200", Statistics.BATCH)):
        row[title] = round(mean(accuracy(m, statistics) for m in made), 1)
        row[f"{title}, block"] = round(accuracy(block, statistics), 1)
    return row


def plot(result: Result, path: Path) -> None:
    """Accuracies on generated pictures against those on the reference block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 5.5), layout="constrained")
    for title, marker in (("source", "o"), ("BN-200", "D")):
        axes.plot(
            [number(r[f"{title}, block"]) for r in result.rows], [number(r[title]) for r in result.rows], marker, label=title
        )
    axes.plot([15, 95], [15, 95], color="grey", linewidth=0.8)
    axes.set_xlabel("accuracy on the authors' code's pictures, %")
    axes.set_ylabel("accuracy on ours, %")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
