"""The rows of the table: every method of the comparison with its settings.

A family is one method; its first row has the published settings and the others were tuned for this student on held-out streams
(seed 100: other orders of pictures and other draws of noise; docs/benchmarks.md has the sweep). Every row goes through every
protocol, and the comparison counts the row that is best under that protocol.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor, nn

from bench.adaptation.baselines import EATA, AlphaBN, Source, SupervisedOracle, Tent
from bench.adaptation.cema import CEMA, PAPER, RELEASED
from bench.adaptation.method import Method
from bench.adaptation.nets import Statistics, to_input
from bench.adaptation.roid import ROID
from demo.images import cifar10, data_folder
from demo.models import load_npz, resnet20, resnet56
from refold.errors import InputError

__all__ = ["ROWS", "Row", "row_named", "weights"]

Kind = Literal["baseline", "bound", "refold"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: stable id; `family`: rows of one method with other settings share it.
        stateless: each batch is answered by itself, so continual is reset and is not run again.
        kind: "baseline" is compared against, "refold" is ours, "bound" uses labels.
        make: a fresh method, given the run's seed.
    """

    name: str
    family: str
    kind: Kind
    precision: str
    settings: str
    make: Callable[[int], Method]
    stateless: bool = False


def weights(name: str) -> Path:
    """A weights file of the data folder. Raises InputError where REFOLD_DATA is unset."""
    folder = data_folder()
    if folder is None or not (folder / name).is_file():
        raise InputError(f"This benchmark needs {name}: set REFOLD_DATA to the folder that holds it.", code="no-data")
    return folder / name


@cache
def student() -> nn.Module:
    return load_npz(resnet20(), weights("resnet20_cifar10.npz"))


@cache
def teacher() -> nn.Module:
    return load_npz(resnet56(), weights("resnet56_cifar10.npz"))


@cache
def clean() -> Tensor:
    """2,000 unlabelled training pictures for EATA's Fisher matrix, as many of each class."""
    images, _ = cifar10("train5k")
    chosen = np.random.default_rng(0).permutation(len(images))[:2000]
    return to_input(images[chosen])


def _refold(name: str) -> Callable[[int], Method]:
    """`make_method(name, seed)` of the file that drives the real engine, adapter and distiller; loaded only when a row runs."""

    def make(seed: int) -> Method:
        method: Method = importlib.import_module("bench.adaptation.refold_method").make_method(name, seed)
        return method

    return make


ROWS: tuple[Row, ...] = (
    Row("source", "source", "baseline", "fp32", "as trained", lambda seed: Source(student()), True),
    Row("bn1", "bn1", "baseline", "fp32", "batch 200", lambda seed: Source(student(), Statistics.BATCH), True),
    Row("alpha-bn", "alpha-bn", "baseline", "fp32", "α 0.5, batch 200", lambda seed: AlphaBN(student(), alpha=0.5), True),
    Row("alpha-bn-tuned", "alpha-bn", "baseline", "fp32", "α 0.4, batch 200", lambda seed: AlphaBN(student(), alpha=0.4), True),
    Row("tent", "tent", "baseline", "fp32", "Adam 1e-3, batch 200", lambda seed: Tent(student())),
    Row("tent-tuned", "tent", "baseline", "fp32", "Adam 3e-3, batch 200", lambda seed: Tent(student(), lr=3e-3)),
    Row("eata", "eata", "baseline", "fp32", "Adam 1e-3, batch 200, ε 0.4, β 1", lambda seed: EATA(student(), clean())),
    Row(
        "eata-tuned",
        "eata",
        "baseline",
        "fp32",
        "Adam 5e-3, batch 200, ε 0.4, β 1",
        lambda seed: EATA(student(), clean(), lr=5e-3),
    ),
    Row("tent-64", "tent", "baseline", "fp32", "Adam 1e-3, batch 64", lambda seed: Tent(student(), batch=64)),
    Row(
        "tent-64-sgd",
        "tent",
        "baseline",
        "fp32",
        "SGD 2.5e-4, momentum 0.9, batch 64",
        lambda seed: Tent(student(), lr=2.5e-4, batch=64, optimiser="sgd"),
    ),
    Row(
        "eata-64",
        "eata",
        "baseline",
        "fp32",
        "Adam 1e-3, batch 64, ε 0.4, β 1",
        lambda seed: EATA(student(), clean(), batch=64),
    ),
    Row(
        "eata-64-sgd",
        "eata",
        "baseline",
        "fp32",
        "SGD 2.5e-4, momentum 0.9, batch 64, ε 0.4, β 1",
        lambda seed: EATA(student(), clean(), lr=2.5e-4, batch=64, optimiser="sgd"),
    ),
    Row("roid", "roid", "baseline", "fp32", "Adam 1e-3, batch 200", lambda seed: ROID(student(), seed=seed)),
    Row("roid-64", "roid", "baseline", "fp32", "Adam 1e-3, batch 64", lambda seed: ROID(student(), batch=64, seed=seed)),
    Row(
        "cema-paper",
        "cema-paper",
        "baseline",
        "fp32",
        "SGD 2.5e-3, batch 64, dynamic thresholds",
        lambda seed: CEMA(student(), teacher(), PAPER, seed=seed),
    ),
    Row(
        "cema-paper-tuned",
        "cema-paper",
        "baseline",
        "fp32",
        "SGD 2.5e-4, batch 64, dynamic thresholds",
        lambda seed: CEMA(student(), teacher(), replace(PAPER, student_lr=2.5e-4), seed=seed),
    ),
    Row(
        "cema-released",
        "cema-paper",
        "baseline",
        "fp32",
        "SGD 2.5e-3, batch 64, ε 0.05",
        lambda seed: CEMA(student(), teacher(), RELEASED, seed=seed),
    ),
    Row(
        "oracle",
        "oracle",
        "bound",
        "fp32",
        "every true label, Adam 5e-3, batch 200, statistics of α-BN 0.5",
        lambda seed: SupervisedOracle(student(), lr=5e-3, alpha=0.5),
    ),
    Row("refold-overlay", "refold-overlay", "refold", "int8", "overlay only, no cloud", _refold("overlay")),
    Row("refold", "refold", "refold", "int8", "overlay + distillation", _refold("distilled")),
    Row("refold-labels", "refold-labels", "bound", "int8", "overlay + true labels on the same uploads", _refold("labels")),
)


def row_named(name: str) -> Row:
    return next(r for r in ROWS if r.name == name)
