"""FORGE's networks on its benchmark (Rehan et al., TMLR 2026): ResNet-20 and half-width MobileNetV2, CIFAR-10-C, severity 5.

Published for FORGE: ResNet-20 67.5 to 68.7 % at batch 1 and 71.3 % at batch 64 (Tent in float: 75.0), MobileNetV2 68.9 % at
batch 64. Their corruption files are the published ones; ours are made again from the same recipe and another seed, so compare
with care. A device answers frame by frame in int8 with default settings and is fresh for each corruption.

    alone       the device's own adaptation
    cloud       and uploads, distillation by the data folder's teachers, releases (`bench.adaptation.refold_method`)
"""

from __future__ import annotations

from concurrent.futures import as_completed
from pathlib import Path
from statistics import mean

import numpy as np

from bench.corrupt import NAMES
from bench.corrupt.streams import stream
from bench.field.device import Device, reference_of
from bench.field.networks import bundle_of
from bench.parallel import one_core_each
from bench.result import Cell, Claim, Options, Result, console, number, progress
from refold.errors import UsageError

__all__ = ["plot", "run"]

FRAMES = {"forge-resnet20": 3000, "forge-mobilenetv2": 2000}
# Settings were chosen on these corruptions (and three that are not here); the others are reported apart.
CHOSEN_ON = frozenset(NAMES[::2])
BARS = {  # device alone, its last quarter, with the cloud
    "forge-resnet20": ((75.5, 76.5), None, (77.5, None)),
    "forge-mobilenetv2": ((71.0, 74.0), (74.0, None), (75.0, None)),
}
CONVERGED = 48


def run(options: Options) -> Result:
    """Full: fifteen corruptions, alone and with the cloud. Quick: four of 500 frames, alone."""
    names = ("shot_noise", "fog", "contrast", "pixelate") if options.quick else NAMES
    kinds = ("alone",) if options.quick else ("alone", "cloud")
    jobs = [(n, k, c, 500 if options.quick else FRAMES[n], options.seed) for n in FRAMES for k in kinds for c in names]
    jobs = [j for j in jobs if options.wants(" / ".join(j[:3]))]
    if not jobs:
        raise UsageError(f"No row is called like {', '.join(options.only)}.")
    for name in FRAMES:
        bundle_of(name)
    rows: list[dict[str, Cell]] = []
    with (
        progress() as bar,
        one_core_each(options.processes) as pool,
    ):
        task = bar.add_task("forge", total=len(jobs))
        futures = [pool.submit(streamed, *job) for job in jobs]
        for future in as_completed(futures):
            rows.append(future.result())
            bar.advance(task)
            r = rows[-1]
            numbers = " ".join(f"{r[k]:6.2f}" for k in ("frozen", "adapted", "last quarter"))
            console.print(f"{r['network']:20s} {r['kind']:6s} {r['corruption']:20s} {numbers}", highlight=False)
    order = {job[:3]: i for i, job in enumerate(jobs)}
    rows.sort(key=lambda r: order[str(r["network"]), str(r["kind"]), str(r["corruption"])])
    settings: dict[str, object] = {"seed": options.seed, "severity": 5, "chosen on": sorted(CHOSEN_ON), "frames": FRAMES}
    columns = ["network", "kind", "corruption", "frozen", "adapted", "last quarter", "converged at", "swaps"]
    return Result("forge", [*_means(rows), *rows], _claims(rows), columns, settings, quick=options.quick)


def streamed(network: str, kind: str, corruption: str, frames: int, seed: int) -> dict[str, Cell]:
    """One row."""
    seen, bundle = stream(corruption, frames, seed=seed), bundle_of(network)
    device = Device(bundle)
    if kind == "alone":
        done = device.run(seen.images)
        adapted, frozen, swaps = done.adapted == seen.labels, done.frozen == seen.labels, done.swaps
    else:
        from bench.adaptation.refold_method import RefoldMethod, Tuning
        from bench.forge.teachers import forge_teachers

        tuning = Tuning()
        teachers = forge_teachers(bundle.preprocess, tuning.distil)
        method = RefoldMethod(bundle, reference_of(bundle), teachers, tuning, seed=seed)
        predictions, _ = method.run(seen.images, seen.labels)
        adapted, frozen, swaps = predictions == seen.labels, device.frozen(seen.images) == seen.labels, []
    quarter = slice(-(len(adapted) // 4), None)
    return {
        "network": network,
        "kind": kind,
        "corruption": corruption,
        "chosen on": corruption in CHOSEN_ON,
        "frozen": round(100 * float(frozen.mean()), 2),
        "adapted": round(100 * float(adapted.mean()), 2),
        "last quarter": round(100 * float(adapted[quarter].mean()), 2),
        "converged at": next((frame for frame, _, local in swaps if local), None),
        "swaps": len(swaps) if kind == "alone" else None,
    }


def _means(rows: list[dict[str, Cell]]) -> list[dict[str, Cell]]:
    out: list[dict[str, Cell]] = []
    for network, kind in dict.fromkeys((str(r["network"]), str(r["kind"])) for r in rows):
        mine = [r for r in rows if (r["network"], r["kind"]) == (network, kind)]
        groups = {"mean": mine, "mean of those not chosen on": [r for r in mine if not r["chosen on"]]}
        for name, some in groups.items():
            if some:
                columns = ("frozen", "adapted", "last quarter")
                numbers: dict[str, Cell] = {c: round(mean(number(r[c]) for r in some), 2) for c in columns}
                out.append({"network": network, "kind": kind, "corruption": name, **numbers})
    return out


def _claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    out = []
    for network, (alone, quarter, cloud) in BARS.items():
        for kind, column, bar in (("alone", "adapted", alone), ("alone", "last quarter", quarter), ("cloud", "adapted", cloud)):
            mine = [number(r[column]) for r in rows if (r["network"], r["kind"]) == (network, kind)]
            if bar is not None and mine:
                text = (
                    f"{network}, {kind}: mean of {len(mine)} corruptions, {'whole streams' if column == 'adapted' else column}"
                )
                name = f"forge.{network}.{kind}.{column.replace(' ', '-')}"
                out.append(Claim(name, text, round(mean(mine), 2), "≥", bar[0], bar[1], " %"))
        found = [number(r["converged at"]) for r in rows if r["network"] == network and r["converged at"] is not None]
        if found:
            text = f"{network}: frames until the first state of the device's own is served, median of {len(found)}"
            out.append(Claim(f"forge.{network}.converged", text, float(np.median(found)), "≤", CONVERGED))
    return out


def plot(result: Result, path: Path) -> None:
    """Bars for each corruption: frozen, alone, with the cloud."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(FRAMES), 1, figsize=(11, 4 * len(FRAMES)), squeeze=False)
    for axis, network in zip(axes[:, 0], FRAMES, strict=True):
        mine = [r for r in result.rows if r["network"] == network and r.get("chosen on") is not None]
        names = list(dict.fromkeys(str(r["corruption"]) for r in mine))
        kinds = [("frozen", "alone", "frozen"), ("alone", "alone", "adapted"), ("with the cloud", "cloud", "adapted")]
        for i, (label, kind, column) in enumerate(kinds):
            held = {str(r["corruption"]): number(r[column]) for r in mine if r["kind"] == kind}
            axis.bar(np.arange(len(names)) + 0.27 * (i - 1), [held.get(n, np.nan) for n in names], 0.26, label=label)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_title(network)
        axis.set_ylabel("accuracy, %")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
