"""The pieces of the elastic benchmark that run side by side, each in a process of its own and kept on disk when it is done."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench.elastic.ort import ptq_accuracy
from bench.elastic.setting import PREPROCESS, UNIFORM, Pictures, Scale, float_net
from bench.result import Cell
from export.capture import capture, program_of
from export.elastic.choose import Choice, choose
from export.elastic.folder import RunFolder, Settings
from export.elastic.genome import genome_of
from export.elastic.pairs import measured_pairs
from export.elastic.search import Budget, Evolution
from export.elastic.space import Configuration, Space, bit_operations, byte_count
from export.elastic.supernet import Supernet
from export.elastic.train import Trainer, calibration_index, fixed_order, train
from refold.atomic import write_atomically

__all__ = ["ELASTIC", "Searched", "alone_name", "measure", "measure_pairs", "search_one", "train_one"]

ELASTIC = "elastic"


def alone_name(w: int, a: int) -> str:
    return f"alone-w{w}a{a}"


def _space(name: str) -> Space:
    if name == ELASTIC:
        return Space()
    w, a = next((w, a) for w, a in UNIFORM if alone_name(w, a) == name)
    return Space((w,), (a,), (True,), (True,), (False,))


def train_one(name: str, scale: Scale, work: Path) -> float:
    """A finished training in `work / name`; one that was interrupted goes on where it was. Returns the seconds of all parts.

    One alone is the same net at these bits only: the usual form, cross-entropy alone, as many steps, same pictures and order.
    """
    torch.set_num_threads(1)
    clock = work / f"seconds-{name}.json"
    started = time.monotonic() - (json.loads(clock.read_text()) if clock.is_file() else 0.0)
    run_folder, space, pictures = RunFolder(work / name), _space(name), Pictures(scale)
    training = replace(scale.training, teacher=name == ELASTIC)
    held = run_folder.checkpoint() if run_folder.started else None
    if held is not None:
        net = run_folder.supernet()
    else:
        program = program_of(float_net(), 32, 32)
        graph, names = capture(program, 32, 32), list(program.graph_signature.parameters)
        x = PREPROCESS.apply(pictures.data.read(calibration_index(pictures.searching, training)))
        net = Supernet.build(graph, space, names, x, lambda what: None)
        run_folder.create(Settings("resnet20", "cifar10", PREPROCESS, space, training), program)
    only = space.uniform(net.layout, space.weight_bits[-1], space.activation_bits[-1])
    trainer = Trainer(net, training, None if name == ELASTIC else fixed_order(only))
    if held is not None:
        trainer.resume(held)
    if trainer.step == training.steps and clock.is_file():
        return float(json.loads(clock.read_text()))

    def on_step(step: int, losses: list[float]) -> None:
        if step % training.checkpoint_every == 0 or step == training.steps:
            write_atomically(clock, [json.dumps(time.monotonic() - started).encode()])

    train(trainer, pictures.data, pictures.searching, PREPROCESS, run_folder, on_step)
    return time.monotonic() - started


def measure_pairs(scale: Scale, work: Path) -> None:
    """What all searches learn from."""
    torch.set_num_threads(1)
    net, pictures = RunFolder(work / ELASTIC).supernet(), Pictures(scale)
    judge = pictures.judge(net, pictures.searching, scale.search)
    measured_pairs(judge, scale.pairs, scale.training.seed, work / "pairs.jsonl")


@dataclass(frozen=True)
class Searched:
    """The best configuration within the bytes and bit operations of a uniform one; how good the predictor was on pairs it never
    saw."""

    found: Configuration
    quality: dict[str, object]


def search_one(w: int, a: int, scale: Scale, work: Path) -> Searched:
    torch.set_num_threads(1)
    net, pictures = RunFolder(work / ELASTIC).supernet(), Pictures(scale)
    choice = _search(w, a, pictures, net, work / "pairs.jsonl")
    q = choice.quality
    quality: dict[str, object] = {
        "predictor pairs": q.pairs, "spearman": round(q.spearman, 3), "pearson": round(q.pearson, 3),
        "kendall": round(q.kendall, 3),
    }  # fmt: skip
    return Searched(choice.best.configuration, quality)


def _search(w: int, a: int, pictures: Pictures, net: Supernet, pairs: Path) -> Choice:
    scale, layout = pictures.scale, net.layout
    like = net.space.uniform(layout, w, a)
    budgets = [
        Budget("bytes", lambda c: byte_count(layout, c), byte_count(layout, like)),
        Budget("bit operations", lambda c: bit_operations(layout, c), bit_operations(layout, like)),
    ]
    evolution = Evolution(generations=scale.generations, seed=scale.training.seed)
    quick, thorough = (pictures.judge(net, pictures.searching, count) for count in (scale.search, scale.final))
    return choose(quick, budgets, pairs, pairs=scale.pairs, rounds=scale.rounds, evolution=evolution, final=thorough)


def measure(name: str, scale: Scale, work: Path, configuration: Configuration | None = None) -> dict[str, Cell]:
    """One row's numbers on the reported pictures: `w4a4`, `alone-w4a4`, a configuration that was found, or `float`. Kept."""
    kept = work / f"row-{name}.json"
    key = None if configuration is None else configuration.to_json()
    if kept.is_file():
        of, row = json.loads(kept.read_text(encoding="utf-8"))
        if of == key:
            return dict(row)
    found = _measured(name, scale, work, configuration)
    write_atomically(kept, [json.dumps([key, found]).encode()])
    return found


def _measured(name: str, scale: Scale, work: Path, configuration: Configuration | None) -> dict[str, Cell]:
    torch.set_num_threads(1)
    pictures = Pictures(scale)
    net = RunFolder(work / (name if name.startswith("alone") else ELASTIC)).supernet()
    report = pictures.judge(net, pictures.reporting, scale.report)
    if name == "float":
        index = pictures.reporting.held
        held = np.sort(np.random.default_rng((scale.training.seed, 5)).permutation(index)[: scale.report])
        calibration = calibration_index(pictures.searching, scale.training)
        ort = ptq_accuracy(float_net(), pictures.data, calibration, held, PREPROCESS)
        return {"accuracy %": _percent(report.float_accuracy()), "ORT static %": _percent(ort)}
    if configuration is None:
        w, a = next((w, a) for w, a in UNIFORM if name.endswith(f"w{w}a{a}"))
        configuration = net.space.uniform(net.layout, w, a)
    row: dict[str, Cell] = {"accuracy %": _percent(report.accuracy(configuration))}
    if not name.startswith("alone"):
        genome = genome_of(net.layout, configuration)
        row["kB"] = round(byte_count(net.layout, configuration) / 1e3, 2)
        row["bit operations M"] = round(bit_operations(net.layout, configuration) / 1e6, 1)
        row["weight bits"] = "".join(map(str, genome.weight_bits))
        row["value bits"] = "".join(map(str, genome.activation_bits))
    return row


def _percent(share: float) -> float:
    return round(100 * share, 2)
