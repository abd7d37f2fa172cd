"""AdaPT on ResNet-20 and CIFAR-10 against the same training in float32: accuracy, bits, zeros, size, and time.

    start        the trained model that every row goes on from, as it is
    float32      the same steps, images, order and schedule without a quantiser
    published    the paper's words of up to 32 bits, switched as its formulae say
    eight bits   integers for an engine whose words never change
    integers     words of at most 8 bits that switch
    shifts       the same, with norms folded into powers of two

Training goes on from the data folder's trained weights, as its 5,000 training images teach a fresh model little. Each row has
the learning rate that is best for it on test images 0 to 1,999 (`python -m bench.tuning fixedpoint`); accuracies are of test
images 2,000 on, which chose nothing. The paper's speed-ups are those of its analytical model, which is computed here as well
and is not a latency; the measured times are ONNX Runtime's on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.adaptation.rows import weights
from bench.parallel import executor
from bench.result import Cell, Claim, Options, Result, number, progress
from demo.images import cifar10
from demo.models import load_npz, resnet20
from export.capture import capture
from export.fixed_point.checkpoint import resume, save
from export.fixed_point.deliver import deliver, sizes
from export.fixed_point.measure import measure
from export.fixed_point.network import Network
from export.fixed_point.power_of_two import scale_errors
from export.fixed_point.report import report
from export.fixed_point.settings import Settings, as_published, for_integers, in_float32
from export.fixed_point.train import Trainer, accuracy
from export.preprocessing import parse_preprocess
from export.targets import TARGETS
from refold.errors import UsageError

__all__ = ["claims", "plot", "run", "settings_of"]

# Micro-batches of 64: with the paper's 4 x 512 pictures a step, an epoch of 5,000 would be two steps. Its plateau schedule is
# made for a hundred epochs; here the rate is halved after every epoch that lowers the loss by less than 3 %.
SCHEDULE = {"patience": 1, "threshold": 0.03, "decay": 0.5}
FULL = {"epochs": 6, "batch": 64, "accumulation": 1, "augment": True, "from_scratch": False, **SCHEDULE}
QUICK = {**FULL, "epochs": 2, "lookback": (4, 8), "refresh": 4}
CHOOSING = 2000  # the first test images: learning rates are chosen on them, and nothing is reported
PICTURES, TESTED = {False: 5000, True: 512}, {False: 8000, True: 500}
RATES = {"float32": 1e-3, "published": 3e-4, "eight bits": 3e-4, "integers": 3e-4, "shifts": 3e-4}
START = "start"
SAVE_EVERY = 50  # steps
PAPER = {
    "training": 1.27,
    "inference": 2.33,
    "size": 0.52,
    "accuracy": 0.98,
}  # arXiv 2107.13490 v4, abstract; points of accuracy
WHOLE, SHORT = "ort-x86-vnni", "ort-x86-avx2"
NEVER = 10**6  # steps between two switches: more than any training has
ROWS: dict[str, Callable[[dict[str, Any], int], Settings]] = {
    "float32": lambda common, seed: in_float32(for_integers(**common, seed=seed)),
    "published": lambda common, seed: as_published(**common, seed=seed),
    "eight bits": lambda common, seed: for_integers(**common, seed=seed, lookback=(NEVER, NEVER)),
    "integers": lambda common, seed: for_integers(**common, seed=seed),
    "shifts": lambda common, seed: for_integers(**common, seed=seed, power_of_two=True),
}


def settings_of(row: str, quick: bool, seed: int, rate: float | None = None, epochs: int | None = None) -> Settings:
    """`rate`, `epochs`: others than the row's own, while they are chosen."""
    common: dict[str, Any] = {**(QUICK if quick else FULL), "learning_rate": rate or RATES[row]}
    if epochs:
        common["epochs"] = epochs
    if row == "eight bits":
        common.pop("lookback", None)
    return ROWS[row](common, seed)


def reported(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the test images that chose nothing, of all classes."""
    return _first(images[CHOOSING:], labels[CHOOSING:], count)


def run(options: Options) -> Result:
    """Full: 6 epochs of 5,000 images, 8,000 tested. Quick: 2 epochs of 512, 500 tested."""
    names = [n for n in ROWS if options.wants(n)]
    if not names:
        raise UsageError(f"No row is called like {', '.join(options.only)}; there are {', '.join(ROWS)}.")
    with progress() as bar, executor(min(options.processes, len(names))) as pool:
        task = bar.add_task(f"training {', '.join(names)}", total=len(names))
        running = {name: pool.submit(_trained_row, name, options) for name in names}
        for _ in as_completed(running.values()):
            left = [name for name, future in running.items() if not future.done()]
            bar.update(task, advance=1, description=f"training {', '.join(left)}" if left else "done")
    rows = [_start(options), *(running[name].result() for name in names)]
    columns = [
        "row",
        "rate",
        "accuracy %",
        "bits",
        "zeros %",
        "size ratio",
        "seconds",
        "modelled training",
        "modelled inference",
        "engine %",
    ]
    columns += ["7-bit engine %", "shift error", "shifted engine %", "int ms", "fp32 ms", "measured inference"]
    told: dict[str, object] = {n: settings_of(n, options.quick, options.seed).encode() for n in names}
    return Result(
        "fixedpoint",
        rows,
        claims(rows),
        columns,
        {"rows": told, "paper": PAPER, "threads": 1, "processes": options.processes},
        options.quick,
    )


def _start(options: Options) -> dict[str, Cell]:
    """The model before any training here, by the same float evaluation as every row."""
    settings = settings_of("float32", options.quick, options.seed)
    module = resnet20() if settings.from_scratch else load_npz(resnet20(), weights("resnet20_cifar10.npz"))
    network = Network(capture(module.eval(), 32, 32), settings)
    images, labels = reported(*cifar10("test"), TESTED[options.quick])
    share = accuracy(network, parse_preprocess("32x32,imagenet"), images, labels)
    return {"row": START, "accuracy %": 100 * share, "bits": 32.0, "size ratio": 1.0}


def _trained_row(name: str, options: Options) -> dict[str, Cell]:
    """Trains and measures one row in this process; what an interrupted run had done is gone on with."""
    torch.set_num_threads(1)
    train, test = _first(*cifar10("train5k"), PICTURES[options.quick]), reported(*cifar10("test"), TESTED[options.quick])
    settings = settings_of(name, options.quick, options.seed)
    module = resnet20() if settings.from_scratch else load_npz(resnet20(), weights("resnet20_cifar10.npz"))
    trainer = Trainer(Network(capture(module.eval(), 32, 32), settings), parse_preprocess("32x32,imagenet"), *train)
    path = options.target.with_suffix(f".{name}.pt")
    if options.resume and path.is_file():
        resume(trainer, path)
    started = time.monotonic()

    def after(t: Trainer) -> None:
        if t.state.step % SAVE_EVERY == 0 or t.state.step == t.steps:
            save(t, path)

    trainer.run(after)
    row: dict[str, Cell] = {
        "row": name,
        "rate": settings.learning_rate,
        "seconds": round(time.monotonic() - started, 1),
        **_row(trainer, *test),
    }
    path.unlink(missing_ok=True)
    return row


def _first(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images spread over all classes."""
    chosen = np.random.default_rng(0).permutation(len(images))[:count]
    return images[chosen], labels[chosen]


def _row(trainer: Trainer, images: np.ndarray, labels: np.ndarray) -> dict[str, Cell]:
    network, told = trainer.network, report(trainer)
    row: dict[str, Cell] = {
        "accuracy %": 100 * accuracy(network, trainer.preprocess, images, labels),
        "bits": told.average_word,
        "zeros %": 100 * told.sparsity,
        "size ratio": told.size_ratio,
        "size ratio with zeros": told.size_ratio_with_zeros,
        "size ratio unweighted": told.size_ratio_unweighted,
        "modelled training": told.modelled_training_speed_up,
        "modelled inference": told.modelled_inference_speed_up,
        "loss": told.loss,
        "steps": told.steps,
        "switches": told.switches,
    }
    if network.settings.float32:
        return row
    x = trainer.preprocess.apply(images)
    shifted = network.settings.power_of_two
    whole, short = deliver(network, TARGETS[WHOLE].qmax), deliver(network, TARGETS[SHORT].qmax)
    exact, fast = (measure(d, TARGETS[t], x, labels, shifted) for d, t in ((whole, WHOLE), (short, SHORT)))
    row |= {f"{key} B": value for key, value in sizes(whole).items()}
    row |= {
        "engine %": 100 * exact.accuracy, "7-bit engine %": 100 * fast.accuracy, "shortened layers": len(short.shortened),
        "integer layers": exact.integer_layers, "int ms": fast.integer_ms, "fp32 ms": fast.float_ms,
        "measured inference": fast.speed_up,
    }  # fmt: skip
    if whole.given.weights:
        errors = scale_errors(whole.integers(power_of_two=True).table)
        row["shift error"] = float(np.sqrt(np.mean([e.rms**2 for e in errors])))
        row["largest shift error"] = max(e.largest for e in errors)
        row["shifted engine %"] = 100 * measure(whole, TARGETS[WHOLE], x, labels, True).accuracy
    return row


def claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    """The paper's numbers are goals; a bar says what must hold for the method to be worth its trouble here.

    Accuracy is claimed against the model that training began with and against float32 at its own best rate: beside a float
    training that does harm, anything gains.
    """
    by = {str(r["row"]): r for r in rows}
    out = []
    for base, text in (
        (START, "accuracy beside the model it began with"),
        ("float32", "accuracy beside float32, its best rate"),
    ):
        for name in ("float32", "published", "integers", "shifts"):
            if name not in by or base not in by or name == base:
                continue
            gained = round(number(by[name]["accuracy %"]) - number(by[base]["accuracy %"]), 4)
            goal = PAPER["accuracy"] if base == "float32" else 0.0
            out.append(Claim(f"fixedpoint.{name}.{base}", f"{name}: {text}", gained, "≥", -0.5, goal, " points"))
    if "integers" in by and "eight bits" in by:
        switched, fixed = by["integers"], by["eight bits"]
        smaller = round(number(switched["size ratio"]) / number(fixed["size ratio"]), 4)
        out.append(Claim("fixedpoint.switching.size", "switching: size ÷ eight bits'", smaller, "≤", 0.9))
        lost = round(number(switched["accuracy %"]) - number(fixed["accuracy %"]), 4)
        out.append(
            Claim("fixedpoint.switching.accuracy", "switching: accuracy beside eight bits", lost, "≥", -0.5, 0.0, " points")
        )
    if "published" in by:
        row = by["published"]
        text = "published: size ÷ float32, weighted by elements, zeros free"
        out.append(Claim("fixedpoint.published.size", text, number(row["size ratio"]), "≤", 0.6, PAPER["size"]))
        for kind in ("training", "inference"):
            text = f"published: {kind} speed-up in the paper's model (no latency)"
            value = number(row[f"modelled {kind}"])
            out.append(Claim(f"fixedpoint.published.{kind}", text, value, "≥", 1.0, PAPER[kind]))
    if "integers" in by:
        row = by["integers"]
        text = "integers: measured speed-up of the integer engine over float32, batch 1"
        out.append(Claim("fixedpoint.integers.latency", text, number(row["measured inference"]), "≥", 1 / 0.75))
        text = "integers: accuracy of the engine beside the trained network"
        gap = number(row["engine %"]) - number(row["accuracy %"])
        out.append(Claim("fixedpoint.integers.engine", text, gap, "≥", -0.5, None, " points"))
    return out


def plot(result: Result, path: Path) -> None:
    """Accuracy, size, and modelled beside measured speed-up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [str(r["row"]) for r in result.rows]
    places = np.arange(len(names))
    figure, (right, small, fast) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    right.bar(places, [number(r["accuracy %"]) for r in result.rows], 0.5)
    right.set_ylabel("test accuracy, %")
    small.bar(places, [number(r["size ratio"]) for r in result.rows], 0.5)
    small.axhline(PAPER["size"], color="#d0342c", linestyle="--")
    small.set_ylabel("size ÷ float32, zeros free (dashed: paper)")
    for shift, key in ((-0.27, "modelled training"), (0.0, "modelled inference"), (0.27, "measured inference")):
        fast.bar(places + shift, [number(r.get(key)) for r in result.rows], 0.25, label=key)
    fast.axhline(1.0, color="#999999", linewidth=0.8)
    fast.set_ylabel("times as fast as float32")
    fast.legend()
    for axes in (right, small, fast):
        axes.set_xticks(places, names)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
