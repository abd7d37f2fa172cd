"""One elastic supernet of ResNet-20 on CIFAR-10, from trained weights, at every bit-width.

Uniform configurations and three searched ones, against the same net at the same bits trained alone for as many steps, and
against ONNX Runtime's own static quantisation at 8 bits. Learned from the first 500 pictures of each class of the train set
(train5k); searched on the test pictures 0 to 1,999; every accuracy is of test pictures from 2,000 on, which nothing has seen.

ONNX Runtime has no static quantisation below 8 bits for convolutions: those cells stay empty.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.adaptation.rows import weights
from bench.bundles import IMAGENET
from bench.elastic_ort import ptq_accuracy
from bench.result import Cell, Claim, Options, Result, number, progress, stage
from demo.images import cifar10
from demo.models import load_npz, resnet20
from export.capture import capture, program_of
from export.elastic.choose import Choice, choose
from export.elastic.data import Labelled, Split
from export.elastic.folder import RunFolder, Settings, Training
from export.elastic.judge import Judge
from export.elastic.search import Budget, Evolution
from export.elastic.space import Configuration, Space, bit_operations, byte_count
from export.elastic.supernet import Supernet
from export.elastic.train import Trainer, calibration_index, fixed_order, train
from refold.preprocess import Preprocess

__all__ = ["claims", "plot", "run"]

UNIFORM = ((8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 4))
SEARCHED = ((4, 4), (3, 3), (2, 4))  # each under the bytes and the bit operations of this uniform one
TRAIN, SEARCH = 5000, 2000  # of the joined pictures: train5k first, then the test set
FULL, QUICK = 2000, 8  # steps
PREPROCESS = Preprocess(32, 32, **IMAGENET)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scale:
    """How large a run is. Pictures: `search` for each measured pair, `report` for each published accuracy."""

    training: Training
    pairs: int
    generations: int
    search: int
    report: int
    alone: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, options: Options) -> Scale:
        steps = options.steps or (QUICK if options.quick else FULL)
        if options.quick:
            small = Training(steps, batch=32, seed=options.seed, checkpoint_every=4, calibration=64)
            return cls(small, pairs=12, generations=20, search=100, report=200, alone=((4, 4), (2, 4)))
        return cls(Training(steps, seed=options.seed), pairs=400, generations=200, search=1000, report=8000, alone=UNIFORM)


@dataclass(frozen=True)
class Pictures:
    """train5k and the test set as one row, so that indices cannot be mixed up."""

    scale: Scale

    @cached_property
    def data(self) -> Labelled:
        (learned, known), (other, truth) = cifar10("train5k"), cifar10("test")
        images, labels = np.concatenate([learned, other]), np.concatenate([known, truth])
        return Labelled(labels, lambda index: images[index])

    def split(self, first: int, last: int) -> Split:
        return Split(np.arange(TRAIN), np.arange(TRAIN + first, TRAIN + last))

    @property
    def searching(self) -> Split:
        return self.split(0, SEARCH)

    @property
    def reporting(self) -> Split:
        return self.split(SEARCH, len(self.data) - TRAIN)

    def judge(self, net: Supernet, split: Split, count: int) -> Judge:
        return Judge(net, self.data, split, PREPROCESS, self.scale.training, count)


def run(options: Options) -> Result:
    """Full: 2,000 steps (hours). Quick: 8 steps, which show that it works and nothing more. `--steps` changes either."""
    torch.set_num_threads(1)
    scale = Scale.of(options)
    pictures = Pictures(scale)
    work = options.target.with_suffix(".work")
    if not options.resume:
        shutil.rmtree(work, ignore_errors=True)
    with progress() as bar:
        task = bar.add_task("elastic", total=None)
        say = stage(bar, task, "elastic")
        started = time.monotonic()
        net = _trained(work / "elastic", Space(), pictures, False, say)
        seconds = time.monotonic() - started
        rows, quality = _rows(net, pictures, work, options, say)
        bar.update(task, description="elastic: done")
    shutil.rmtree(work, ignore_errors=True)
    settings: dict[str, object] = {
        "data": "CIFAR-10: train5k learns, test 0-1999 searches, test 2000-9999 reports",
        "net": "ResNet-20 from resnet20_cifar10.npz", "steps": scale.training.steps, "batch": scale.training.batch,
        "supernet seconds": round(seconds, 1), "pairs": scale.pairs, "report pictures": scale.report, "seed": options.seed,
        **quality,
    }  # fmt: skip
    columns = ["configuration", "accuracy %", "alone %", "ORT static %", "kB", "bit operations M", "equal to"]
    return Result("elastic", rows, claims(rows, settings), columns, settings, options.quick)


def _trained(folder: Path, space: Space, pictures: Pictures, alone: bool, say: Callable[[str], None]) -> Supernet:
    """A finished training; one that was interrupted goes on where it was.

    Args:
        alone: the space holds one configuration, which is all that is trained.
    """
    run_folder, training = RunFolder(folder), pictures.scale.training
    held = run_folder.checkpoint() if run_folder.started else None
    if held is not None:
        net = run_folder.supernet()
    else:
        program = program_of(_float_net(), 32, 32)
        graph, names = capture(program, 32, 32), list(program.graph_signature.parameters)
        x = PREPROCESS.apply(pictures.data.read(calibration_index(pictures.searching, training)))
        net = Supernet.build(graph, space, names, x, say)
        run_folder.create(Settings("resnet20", "cifar10", PREPROCESS, space, training), program)
    only = space.uniform(net.layout, space.weight_bits[-1], space.activation_bits[-1])
    trainer = Trainer(net, training, fixed_order(only) if alone else None)
    if held is not None:
        trainer.resume(held)

    def told(step: int, losses: list[float]) -> None:
        say(f"{folder.name}, step {step} of {training.steps}: {losses[0]:.3f}")

    train(trainer, pictures.data, pictures.searching, PREPROCESS, run_folder, told)
    return net


def _float_net() -> nn.Module:
    return load_npz(resnet20(), weights("resnet20_cifar10.npz")).eval()


def _rows(
    net: Supernet, pictures: Pictures, work: Path, options: Options, say: Callable[[str], None]
) -> tuple[list[dict[str, Cell]], dict[str, object]]:
    scale, layout, space = pictures.scale, net.layout, net.space
    report = pictures.judge(net, pictures.reporting, scale.report)
    say("float and ONNX Runtime")
    index = pictures.reporting.held
    held = np.sort(np.random.default_rng((scale.training.seed, 5)).permutation(index)[: scale.report])
    ort = ptq_accuracy(_float_net(), pictures.data, calibration_index(pictures.searching, scale.training), held, PREPROCESS)
    rows: list[dict[str, Cell]] = [{"configuration": "float", "accuracy %": _percent(report.float_accuracy())}]
    for w, a in UNIFORM:
        if not options.wants(f"w{w}a{a}"):
            continue
        say(f"w{w}a{a}")
        row = _row(f"w{w}a{a}", space.uniform(layout, w, a), report)
        if (w, a) in scale.alone:
            row["alone %"] = _alone(w, a, pictures, work, say)
        if (w, a) == (8, 8):
            row["ORT static %"] = _percent(ort)
        rows.append(row)
    quality: dict[str, object] = {}
    for w, a in SEARCHED:
        if not options.wants(f"searched w{w}a{a}"):
            continue
        choice = _searched(w, a, pictures, net, work, say)
        row = _row(f"searched w{w}a{a}", choice.finalists[0].configuration, report)
        rows.append(row | {"equal to": f"w{w}a{a}"})
        q = choice.quality
        quality = {"predictor pairs": q.pairs, "pearson": round(q.pearson, 3), "kendall": round(q.kendall, 3)}
    return rows, quality


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _row(name: str, configuration: Configuration, report: Judge) -> dict[str, Cell]:
    layout = report.supernet.layout
    return {
        "configuration": name, "accuracy %": _percent(report.accuracy(configuration)),
        "kB": round(byte_count(layout, configuration) / 1e3, 2),
        "bit operations M": round(bit_operations(layout, configuration) / 1e6, 1),
    }  # fmt: skip


def _alone(w: int, a: int, pictures: Pictures, work: Path, say: Callable[[str], None]) -> float:
    """The same net at these bits only: the usual form, cross-entropy alone, as many steps."""
    space = Space((w,), (a,), (True,), (True,), (False,))
    net = _trained(work / f"alone-w{w}a{a}", space, pictures, True, say)
    report = pictures.judge(net, pictures.reporting, pictures.scale.report)
    return _percent(report.accuracy(space.uniform(net.layout, w, a)))


def _searched(w: int, a: int, pictures: Pictures, net: Supernet, work: Path, say: Callable[[str], None]) -> Choice:
    scale, layout = pictures.scale, net.layout
    like = net.space.uniform(layout, w, a)
    budgets = [
        Budget("bytes", lambda c: byte_count(layout, c), byte_count(layout, like)),
        Budget("bit operations", lambda c: bit_operations(layout, c), bit_operations(layout, like)),
    ]
    return choose(
        pictures.judge(net, pictures.searching, scale.search), budgets, work / "pairs.jsonl", pairs=scale.pairs,
        finalists=3, evolution=Evolution(generations=scale.generations, seed=scale.training.seed),
        progress=lambda what, done, total: say(f"like w{w}a{a}: {what} {done} of {total}"),
    )  # fmt: skip


def claims(rows: list[dict[str, Cell]], settings: dict[str, object]) -> list[Claim]:
    """Bars: the paper's correlations; a searched net at least as good as the uniform one; a shared net close to one alone."""
    by_name = {str(r["configuration"]): r for r in rows}
    out = []
    for key, bar in (("pearson", 0.9), ("kendall", 0.8)):
        if key in settings:
            text = f"predictor, {key} on pairs it never saw"
            out.append(Claim(f"elastic.{key}", text, number(settings[key]), "≥", bar))  # type: ignore[arg-type]
    for row in rows:
        name = str(row["configuration"])
        if row.get("equal to") in by_name:
            gain = number(row["accuracy %"]) - number(by_name[str(row["equal to"])]["accuracy %"])
            out.append(Claim(f"elastic.{name}", f"{name} over the uniform one of equal cost", gain, "≥", 0.0, 0.5, " points"))
        if row.get("alone %") is not None:
            gain = number(row["accuracy %"]) - number(row["alone %"])
            out.append(Claim(f"elastic.{name}.alone", f"{name}: elastic over trained alone", gain, "≥", -1.0, 0.0, " points"))
    if "w8a8" in by_name and by_name["w8a8"].get("ORT static %") is not None:
        gain = number(by_name["w8a8"]["accuracy %"]) - number(by_name["w8a8"]["ORT static %"])
        out.append(
            Claim("elastic.w8a8.ort", "w8a8: elastic over ONNX Runtime's static quantisation", gain, "≥", -0.5, 0.0, " points")
        )
    return out


def plot(result: Result, path: Path) -> None:
    """Accuracy over size: elastic, alone, searched, float."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    uniform = [r for r in result.rows if r.get("kB") and not r.get("equal to")]
    searched = [r for r in result.rows if r.get("equal to")]
    for rows, key, label, mark in (
        (uniform, "accuracy %", "elastic, uniform", "o-"),
        (uniform, "alone %", "trained alone", "s--"),
        (searched, "accuracy %", "elastic, searched", "*"),
        (uniform, "ORT static %", "ONNX Runtime static, 8 bits", "x"),
    ):
        points = sorted((number(r["kB"]), number(r[key]), str(r["configuration"])) for r in rows if r.get(key) is not None)
        if points:
            axes.plot([p[0] for p in points], [p[1] for p in points], mark, label=label)
        if label == "elastic, uniform":
            for x, y, name in points:
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
    floats = [number(r["accuracy %"]) for r in result.rows if r["configuration"] == "float"]
    if floats:
        axes.axhline(floats[0], color="grey", linewidth=0.8, label="float")
    steps = result.settings.get("steps")
    axes.set(xlabel="kB", ylabel="accuracy, %", title=f"ResNet-20, CIFAR-10, {steps} steps{' (quick)' if result.quick else ''}")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
