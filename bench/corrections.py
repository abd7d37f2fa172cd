"""Output corrections on ResNet-20 and CIFAR-10: with and without each, on ordered and shuffled streams, clean and shifted.

    always     the correction on every frame, as its paper has it, whatever the stream
    switched   the same where the permutation test on predicted classes supports it: what a device serves
    look       the second look: unsure answers averaged with the mirrored image's, and its mean compute

The float network's logits are computed once; corrections, switch and second look are the device's own code. Every stream is an
order of the same 5,000 test images (2,000 with --quick). Seed 100 has the streams that chose the switch's numbers (gaussian
noise, brightness); every other seed those that are reported (shot noise, fog, pixelate).

Shifted sets come twice: as the trained network answers them, and "adapted", with norm statistics mixed at 0.45 over batches of
200 frames, about what a device serves once its own adaptation has converged (it adapts nothing on clean images).

"clean, then": half a stream clean, half shifted, both shuffled; a network may begin to answer one class there. The device's
shift detector says when the domain changed, and the switch begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.adaptation.nets import Statistics, adaptable, to_input
from bench.adaptation.rows import student, weights
from bench.corrupt.streams import stream
from bench.orders import ORDERS, order
from bench.result import Cell, Claim, Options, Result, number, progress
from demo.images import load_u8
from edge.adapt import HOME, AdaptSettings, Reference, ShiftDetector
from edge.adapt.features import image_features
from edge.adaptation.corrections import AUTO, CORRECTIONS, RunEvidence, SecondLook
from edge.adaptation.novelty import NoveltyGate, NoveltySettings
from edge.softmax import softmax

__all__ = ["always", "plot", "run", "second_looks", "switched"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
CLASSES = 10
REPORTED = ("clean", "shot_noise", "fog", "pixelate")
CHOOSING = ("clean", "gaussian_noise", "brightness")
CHOOSING_SEED = 100
CALIBRATION = 256  # training images that stand for a bundle's calibration slice
SHUFFLES = 100  # random orders of each stream, for the rate of false switches
MIX, BATCH = 0.45, 200  # share of the batch's statistics in the adapted network's, and frames in a batch
LOSS = 0.3  # points below uncorrected that no switched stream may be


@dataclass(frozen=True)
class Frames:
    """One set of images and what the network says of them and of their mirror images; logits float32 (N, 10)."""

    name: str
    images: U8
    labels: I64
    logits: F32
    mirrored: F32


def run(options: Options) -> Result:
    """All orders of every set, the false switches of shuffled ones, second looks, and marks of the novelty gate."""
    torch.set_num_threads(1)
    names = CHOOSING if options.seed == CHOOSING_SEED else REPORTED
    sets = [(name, adapted) for name in names for adapted in (False, True) if name != "clean" or not adapted]
    count = 2000 if options.quick else 5000
    rows: list[dict[str, Cell]] = []
    false = frames = 0
    gate_images, gate_logits = _calibration()
    with progress() as bar:
        task = bar.add_task("corrections", total=len(sets) * (len(ORDERS) + 2))
        clean: Frames | None = None
        for name, adapted in sets:
            have = _frames(name, count, options.seed, adapted)
            clean = clean or have
            bar.advance(task)
            for i, title in enumerate(ORDERS):
                seeds = range(3) if title == "one class" else range(1)
                parts = [order(title, have.labels, np.random.default_rng([options.seed, i, s])) for s in seeds]
                if options.wants(title):
                    rows.append(_row(title, have.name, [(have.logits[p], have.labels[p]) for p in parts], []))
                bar.advance(task)
            if name != "clean" and not adapted and options.wants("clean, then"):
                rows.append(_shifted(clean, have))
            some = _false_switches(have, options.seed)
            false, frames = false + some, frames + SHUFFLES * len(have.labels)
            shuffled_row = next((r for r in rows if (r["order"], r["images"]) == ("shuffled", have.name)), None)
            if shuffled_row is not None:
                shuffled_row |= _looked(have)
                if not adapted:
                    shuffled_row["marked %"] = round(100 * _marked(gate_images, gate_logits, clean, have), 1)
            bar.advance(task)
    columns = ["order", "images", "uncorrected"]
    columns += [f"{name} {how}" for name in CORRECTIONS for how in ("always", "switched")]
    columns += ["on %", "second look", "compute", "marked %"]
    settings: dict[str, object] = {"frames": count, "severity": 5, "seed": options.seed, "network": "ResNet-20, float32"}
    return Result("corrections", rows, _claims(rows, false, frames), columns, settings, options.quick)


# One stream -------------------------------------------------------------------------------------------------------------------


def always(name: str, logits: F32, fresh: Collection[int] = (), known: F32 | None = None) -> I64:
    """Classes (N,) that a correction answers with when it is on for every frame of float32 (N, C); it forgets at `fresh`."""
    correction = CORRECTIONS[name](logits.shape[1], known)
    out = np.empty(len(logits), np.int64)
    for i, row in enumerate(logits):
        if i in fresh:
            correction.forget()
        correction.observe(row, softmax(row)[0])
        out[i] = correction.corrected().argmax()
    return out


def switched(logits: F32, fresh: Collection[int] = ()) -> NDArray[np.bool_]:
    """For each frame of float32 (N, C) whether the switch is on; the evidence begins anew at the frames `fresh`."""
    evidence = RunEvidence(logits.shape[1])
    out = np.zeros(len(logits), np.bool_)
    for i, predicted in enumerate(logits.argmax(1).tolist()):
        if i in fresh:
            evidence.forget()
        out[i] = evidence.saw(predicted)
    return out


def second_looks(logits: F32, mirrored: F32) -> tuple[I64, float]:
    """(classes (N,), mean compute) when the second look is on."""
    look = SecondLook(logits.shape[1])
    out = np.empty(len(logits), np.int64)
    for i, row in enumerate(logits):
        p, out[i], entropy = softmax(row)
        if look.wants(entropy):
            out[i] = look.average(p, softmax(mirrored[i])[0]).argmax()
    return out, look.metrics()["compute_ratio"]


def _row(title: str, images: str, streams: list[tuple[F32, I64]], fresh: list[int]) -> dict[str, Cell]:
    row: dict[str, Cell] = {"order": title, "images": images}
    plain = [logits.argmax(1) == labels for logits, labels in streams]
    on = [switched(logits, fresh) for logits, _ in streams]
    known = _calibration()[1]
    row["uncorrected"] = _percent(plain)
    for name in CORRECTIONS:
        right = [always(name, logits, fresh, known) == labels for logits, labels in streams]
        row[f"{name} always"] = _percent(right)
        row[f"{name} switched"] = _percent([np.where(o, r, p) for o, r, p in zip(on, right, plain, strict=True)])
    row["on %"] = _percent(on)
    return row


def _percent(parts: list[NDArray[np.bool_]]) -> float:
    return round(100 * float(np.concatenate(parts).mean()), 2)


def _shifted(clean: Frames, have: Frames) -> dict[str, Cell]:
    """The shift in the middle of a shuffled stream, and where the device's own detector sees it."""
    half = len(have.labels) // 2
    logits = np.concatenate([clean.logits[:half], have.logits[half:]])
    labels = np.concatenate([clean.labels[:half], have.labels[half:]])
    settings = AdaptSettings()
    detector = ShiftDetector(settings, Reference.measure(_calibration()[0]))
    fresh = []
    for i in range(0, 2 * half, settings.watch_every):
        values = image_features(clean.images[i] if i < half else have.images[i])
        if frames := detector.watch(values):
            fresh.append(i)
            detector.restart(values, frames)
        else:
            detector.learn(values)
    return _row("clean, then", have.name, [(logits, labels)], fresh)


# Every set --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logits(images: U8, adapted: bool = False) -> F32:
    net = adaptable(student(), Statistics.MIXED, MIX) if adapted else student()
    parts = [net(to_input(images[i : i + BATCH])).numpy() for i in range(0, len(images), BATCH)]
    return np.concatenate(parts).astype(np.float32)


def _frames(name: str, count: int, seed: int, adapted: bool) -> Frames:
    s = stream(name, count, seed=seed)
    mirrored = np.ascontiguousarray(s.images[:, :, ::-1])
    label = f"{name}, adapted" if adapted else name
    return Frames(label, s.images, s.labels, _logits(s.images, adapted), _logits(mirrored, adapted))


@cache
def _calibration() -> tuple[U8, F32]:
    images = load_u8(weights("cifar10_train5k.u8.xz"))[:CALIBRATION]
    return images, _logits(images)


def _false_switches(have: Frames, seed: int) -> int:
    """How often the switch goes on in random orders of a set, from none to none."""
    rng = np.random.default_rng(seed)
    times = 0
    predicted = have.logits.argmax(1)
    for _ in range(SHUFFLES):
        evidence = RunEvidence(CLASSES)
        for p in rng.permutation(predicted).tolist():
            evidence.saw(p)
        times += math.ceil(evidence.switches / 2)
    return times


def _looked(have: Frames) -> dict[str, Cell]:
    classes, ratio = second_looks(have.logits, have.mirrored)
    return {"second look": _percent([classes == have.labels]), "compute": round(ratio, 3)}


def _marked(images: U8, logits: F32, clean: Frames, have: Frames) -> float:
    """Share of looked-at frames that the novelty gate marks, after half of the clean ones, before the domain is learnt."""
    gate = NoveltyGate(images, logits, HOME, NoveltySettings(steady=len(have.labels)))
    half = len(clean.labels) // 2
    for image, row in zip(clean.images[:half], clean.logits[:half], strict=True):
        gate.look(image, row, HOME)
    novel, looked = gate.novel, gate.looked
    domain = HOME if have.name == clean.name else have.name
    for image, row in zip(have.images[half:], have.logits[half:], strict=True):
        gate.look(image, row, domain)
    return (gate.novel - novel) / max(gate.looked - looked, 1)


def _claims(rows: list[dict[str, Cell]], false: int, frames: int) -> list[Claim]:
    def gains(name: str, *orders: str) -> list[float]:
        return [
            number(r[f"{name} switched"]) - number(r["uncorrected"]) for r in rows if not orders or str(r["order"]) in orders
        ]

    claims = []
    for adapted in (False, True):
        which = "norms adapted" if adapted else "nothing adapted"
        found = [g for g, r in zip(gains(AUTO), rows, strict=True) if str(r["images"]).endswith("adapted") == adapted]
        claims.append(
            Claim(
                f"corrections.worst{'.adapted' if adapted else ''}",
                f"auto ({AUTO}), switched, {which}: smallest difference from uncorrected, any stream",
                round(min(found, default=math.nan), 2),
                "≥",
                -LOSS,
                0.0,
                " points",
            )
        )
    runs = gains(AUTO, "sorted", "alternating 20")
    claims.append(
        Claim(
            "corrections.runs",
            f"auto ({AUTO}), switched: mean gain on sorted and alternating streams",
            round(sum(runs) / len(runs), 2) if runs else math.nan,
            "≥",
            1.0,
            None,
            " points",
        )
    )
    rate = 1e5 * false / frames if frames else math.nan
    claims.append(Claim("corrections.false", "switches on shuffled streams, per 100,000 frames", round(rate, 3), "≤", 1.0))
    ratios = [number(r["compute"]) for r in rows if "compute" in r]
    claims.append(Claim("corrections.compute", "second look: mean compute, any set", max(ratios, default=math.nan), "≤", 1.2))
    return claims


def plot(result: Result, path: Path) -> None:
    """Gain of each switched correction over uncorrected, one group of bars per order, mean over sets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(str(r["order"]) for r in result.rows))
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for k, name in enumerate(CORRECTIONS):
        means = [
            np.mean([number(r[f"{name} switched"]) - number(r["uncorrected"]) for r in result.rows if r["order"] == title])
            for title in titles
        ]
        axes.bar(np.arange(len(titles)) + 0.25 * (k - 1), means, 0.25, label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(titles)), titles, rotation=20, ha="right")
    axes.set_ylabel("points over uncorrected, switched")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
