"""One bundle, two runtimes: the same integers written for ONNX Runtime and for LiteRT.

For each net: what exporting costs, how often both choose the same class, accuracy against float where there are labels, and for
each target latency, size, the swap, and whether refolded engines are their state's own export. Then MLPerf Tiny's int8 ResNet-8
as its authors converted it, against our export of the same float weights, both run by the same LiteRT interpreter.

Every net is measured in a process of its own: peak memory is that process's when the export ends.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.bundles import MORE_NETS, Subject, subject
from bench.exactness import STRENGTHS, random_states
from bench.paired import paired
from bench.result import Cell, Claim, Options, Result, number, progress
from demo.images import cifar10, data_folder
from edge.engine import EngineFactory
from edge.serving import ServingState
from export.pipeline import fresh_export
from export.runtimes import runtime_of
from export.targets import target_named
from refold.errors import InputError, RefoldError, UsageError

__all__ = ["claims", "plot", "run"]

F32 = NDArray[np.float32]
TARGETS = ("ort-x86-avx2", "litert")
MLPERF = "resnet8_mlperftiny_int8.tflite"
BLOCK = 40  # inferences in a timed block of a 32x32 net; a quarter of a second and more either way
LABELLED, CROPS = 10_000, 64


def run(options: Options) -> Result:
    """Full: seven nets, 10 states each, all 10,000 test pictures. Quick: the two CIFAR nets, 3 states, 1,000 pictures."""
    names = [n for n in MORE_NETS if options.wants(n) and not (options.quick and MORE_NETS[n].side > 32)]
    if not names:
        raise UsageError(f"No net is called like {', '.join(options.only)}; there are {', '.join(MORE_NETS)}.")
    rows: list[dict[str, Cell]] = []
    fresh_process = multiprocessing.get_context("spawn")
    with progress() as bar:
        task = bar.add_task("nets", total=len(names) + 1)
        for name in names:
            bar.update(task, description=name)
            with fresh_process.Pool(1) as pool:
                try:
                    rows += pool.apply(measured, (name, options.quick, options.seed))
                except RefoldError as e:  # the other nets' minutes are not lost with this one
                    rows.append({"net": name, "target": "all", "exported": 0, "note": e.message})
            bar.advance(task)
        if options.wants("resnet8"):
            bar.update(task, description="MLPerf Tiny's ResNet-8")
            with fresh_process.Pool(1) as pool:
                rows += pool.apply(beside_mlperf, (options.quick,))
        bar.advance(task)
    columns = ["net", "target", "accuracy", "float", "same class", "steps apart", "ms", "model B", "swap ms", "identical"]
    columns += ["export s", "peak MB", "note"]
    return Result(
        "targets",
        rows,
        claims(rows),
        columns,
        {"threads": 1, "export threads": os.cpu_count(), "batch": 1, "seed": options.seed},
        options.quick,
    )


def measured(name: str, quick: bool, seed: int) -> list[dict[str, Cell]]:
    """The rows of one net, one for each target. Runs in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="refold-bench-") as folder:
        net = subject(name, Path(folder), targets=TARGETS, threads=os.cpu_count() or 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        frames, labels = _frames(net, 1000 if quick else LABELLED)
        x = net.bundle.preprocess.apply(frames)
        factories = {t: EngineFactory(net.bundle, t) for t in TARGETS}
        engines = {t: f.build(ServingState()) for t, f in factories.items()}
        logits = {t: _all(engine.run, x) for t, engine in engines.items()}
        truth = _float(net.module, x)
        times = _times(engines, net, 5 if quick else 7)
        shared: dict[str, Cell] = {
            "net": name, "weights": net.net.weights, "pictures": len(x), "export s": round(net.seconds, 1),
            "peak MB": round(peak), "float": _accuracy(truth, labels), **_apart(logits),
        }  # fmt: skip
        rows = []
        for target in TARGETS:
            part = net.bundle.target(target).model
            rows.append(
                shared
                | {
                    "target": target,
                    "accuracy": _accuracy(logits[target], labels),
                    "agrees with float": round(100 * float((logits[target].argmax(1) == truth.argmax(1)).mean()), 2),
                    "ms": times[target],
                    "model B": {p.path: p.size for p in net.bundle.parts}[part],
                    "integer layers": factories[target].integer_layers,
                    "swap ms": _swap_ms(factories[target], 5 if quick else 11),
                    **_identical(net, factories[target], x[:4], 3 if quick else 10, seed),
                }
            )
        return rows


def _frames(net: Subject, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    if net.net.side == 32:
        images, labels = cifar10("test")
        return images[:count], labels[:count].astype(np.int64)
    return net.frames(CROPS, seed=1), None


def _all(run: Any, x: F32) -> F32:
    return np.concatenate([run(x[i : i + 50]) for i in range(0, len(x), 50)])


def _float(module: torch.nn.Module, x: F32) -> F32:
    with torch.no_grad():
        return _all(lambda part: module(torch.from_numpy(part)).numpy(), x)


def _accuracy(logits: F32, labels: NDArray[np.int64] | None) -> float | None:
    return None if labels is None else round(100 * float((logits.argmax(1) == labels).mean()), 2)


def _apart(logits: Mapping[str, F32]) -> dict[str, Cell]:
    """How far the runtimes' answers lie apart: share of equal classes, largest difference in steps of 255 over the range."""
    ours, theirs = (logits[t] for t in TARGETS)
    step = float(ours.max() - ours.min()) / 255
    same = float((ours.argmax(1) == theirs.argmax(1)).mean())
    return {"same class": round(100 * same, 3), "steps apart": round(float(np.abs(ours - theirs).max()) / step, 2)}


def _times(engines: Mapping[str, Any], net: Subject, pairs: int) -> dict[str, float]:
    x = net.bundle.preprocess.apply(net.frames(1))
    count = BLOCK if net.net.side == 32 else 3

    def block(target: str) -> Any:
        return lambda: [engines[target].run(x) for _ in range(count)]

    found = paired(block(TARGETS[0]), block(TARGETS[1]), pairs)
    return dict(zip(TARGETS, (round(t, 4) for t in found.each(count)), strict=True))


def _swap_ms(factory: EngineFactory, swaps: int) -> float:
    """From a decoded release to an engine that may serve: build and canary. Median."""
    taken = []
    for i in range(swaps):
        states = random_states(factory.bundle.norms, STRENGTHS[0], i)
        started = time.perf_counter()
        factory.canary(factory.build(ServingState(states)))
        taken.append(time.perf_counter() - started)
    return round(1e3 * median(taken), 2)


def _identical(net: Subject, factory: EngineFactory, x: F32, count: int, seed: int) -> dict[str, Cell]:
    """Random states whose refolded engine gives the logits of a fresh export at that state, bit for bit."""
    profile, same = target_named(factory.target), 0
    runtime = runtime_of(profile)
    for i in range(count):
        states = random_states(net.bundle.norms, STRENGTHS[i % 2], seed * 10_000 + i)
        artefact, model = fresh_export(net.exported.recipe, states, profile)
        same += np.array_equal(factory.build(ServingState(states)).run(x), runtime.written(artefact, model, x))
    return {"identical": same, "states": count}


def beside_mlperf(quick: bool) -> list[dict[str, Cell]]:
    """Two rows: the file of mlcommons/tiny and our export for LiteRT alone, which takes 8-bit codes."""
    from ai_edge_litert.interpreter import Interpreter

    folder = data_folder()
    if folder is None or not (folder / MLPERF).is_file():
        raise InputError(f"MLPerf Tiny's ResNet-8 is missing: set REFOLD_DATA to a folder with {MLPERF}.", code="no-data")
    images, labels = cifar10("test")
    count = 1000 if quick else LABELLED
    images, labels = images[:count], labels[:count].astype(np.int64)
    theirs = (folder / MLPERF).read_bytes()
    with tempfile.TemporaryDirectory(prefix="refold-bench-") as scratch:
        net = subject("resnet8", Path(scratch), targets=("litert",))
        ours = net.bundle.read(net.bundle.target("litert").model)
        truth = _accuracy(_float(net.module, net.bundle.preprocess.apply(images)), labels)

    rows: list[dict[str, Cell]] = []
    for name, content in (("MLPerf Tiny's own file", theirs), ("Refold's export", ours)):
        interpreter = Interpreter(model_content=content, num_threads=1)
        interpreter.allocate_tensors()
        entry, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]["index"]
        scale, zero_point = entry["quantization"]
        codes = np.clip(np.rint(images.astype(np.float32) / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
        right = 0
        for picture, label in zip(codes, labels, strict=True):
            interpreter.set_tensor(entry["index"], picture[None])
            interpreter.invoke()
            right += int(interpreter.get_tensor(answer)[0].argmax() == label)
        row: dict[str, Cell] = {"net": f"resnet8: {name}", "target": "litert", "accuracy": round(100 * right / len(codes), 2)}
        rows.append(row | {"float": truth, "model B": len(content), "pictures": len(codes)})
    return rows


def claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    """Issue 3, "Shows" 3 and 4."""
    out = []
    for row in rows:
        net, target = str(row["net"]), str(row["target"])
        if "exported" in row:
            out.append(Claim(f"targets.{net}.exported", f"{net}: exported for both targets", number(row["exported"]), "≥", 1))
        if "identical" not in row:
            continue
        key = f"targets.{net}.{target}"
        if row["accuracy"] is not None:
            lost = round(number(row["float"]) - number(row["accuracy"]), 2)
            out.append(Claim(f"{key}.accuracy", f"{net} on {target}: points below float", lost, "≤", 0.5))
        text = f"{net} on {target}: states bit-identical to a fresh export, of {number(row['states']):.0f}"
        out.append(Claim(f"{key}.identical", text, number(row["identical"]), "≥", number(row["states"])))
        if target == TARGETS[0]:
            text = f"{net}: pictures on which both runtimes choose the same class"
            out.append(Claim(f"targets.{net}.same", text, number(row["same class"]), "≥", 99.5, None, " %"))
        if net == "resnet50" and target == TARGETS[0]:
            text = "resnet50: export for both targets with every check, seconds"
            out.append(Claim("targets.resnet50.export", text, number(row["export s"]), "≤", 60, None, " s"))
    beside = [r for r in rows if "identical" not in r and "exported" not in r]
    if beside:
        theirs, ours = beside
        gained = round(number(ours["accuracy"]) - number(theirs["accuracy"]), 2)
        out.append(Claim("targets.mlperf.accuracy", "ResNet-8: points above MLPerf Tiny's own file", gained, "≥", 0.0))
        size = round(number(ours["model B"]) / number(theirs["model B"]), 3)
        out.append(Claim("targets.mlperf.size", "ResNet-8: our file ÷ MLPerf Tiny's", size, "≤", 1.05))
    return out


def plot(result: Result, path: Path) -> None:
    """Latency, size and swap of each target, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result.rows if "identical" in r]
    names = list(dict.fromkeys(str(r["net"]) for r in rows))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, key, label in zip(
        axes,
        ("ms", "model B", "swap ms"),
        ("ms, batch 1, one thread", "model file, bytes", "build and canary, ms"),
        strict=True,
    ):
        for shift, target in ((-0.2, TARGETS[0]), (0.2, TARGETS[1])):
            heights = [number(next(r[key] for r in rows if r["net"] == n and r["target"] == target)) for n in names]
            ax.bar(np.arange(len(names)) + shift, heights, 0.4, label=target)
        ax.set_yscale("log")
        ax.set_ylabel(label)
        ax.set_xticks(np.arange(len(names)), names, rotation=20, ha="right")
    axes[0].legend()
    figure.suptitle("One bundle on two runtimes")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
