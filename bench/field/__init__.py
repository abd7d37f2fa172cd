"""Streams of the field: no stream may end below the exported model frozen.

Each network x stream is a fresh device with default settings, alone (no cloud). A long clean stream counts false alarms and
what they cost. Settings were chosen on other seeds and, for all but ResNet-20, on one half of the corruptions
(docs/benchmarks.md).

    networks   the networks as bundles, and images they have not seen
    streams    what comes in which order
    device     the loop of one device
    report     rows and claims
"""

from __future__ import annotations

from concurrent.futures import as_completed
from pathlib import Path

import numpy as np

from bench.field.device import Device
from bench.field.networks import NETWORKS, bundle_of, images_of
from bench.field.report import claims, row
from bench.field.streams import Part, frames_of, streams_for
from bench.parallel import one_core_each
from bench.result import Cell, Claim, Options, Result, console, number, progress
from refold.errors import UsageError

__all__ = ["plot", "run"]

LONG = "clean for a long time"
LONG_FRAMES = 100_000
QUICK = ("clean", "clean, ships", "noise", "JPEG, Dirichlet 0.1", "day and dark, twice")
FRAMES_A_WEEK = 25 * 3600 * 24 * 7


def run(options: Options) -> Result:
    """Full: every stream on every network, and 100,000 clean frames of the two CIFAR networks. Quick: five streams."""
    jobs = [(n, s) for n in NETWORKS for s in streams_for(NETWORKS[n].photographs) if not options.quick or s in QUICK]
    jobs += [] if options.quick else [(n, LONG) for n in NETWORKS if not NETWORKS[n].photographs]
    jobs = [job for job in jobs if options.wants(" / ".join(job))]
    if not jobs:
        raise UsageError(f"No stream is called like {', '.join(options.only)}.")
    for name in dict.fromkeys(n for n, _ in jobs):
        bundle_of(name)  # once, before processes would each make it
    rows: list[dict[str, Cell]] = []
    with (
        progress() as bar,
        one_core_each(options.processes) as pool,
    ):
        task = bar.add_task("field", total=len(jobs))
        futures = {pool.submit(streamed, *job, options.seed): job for job in jobs}
        for future in as_completed(futures):
            rows.append(future.result())
            bar.advance(task)
            r = rows[-1]
            numbers = " ".join(f"{r[k]:6.2f}" for k in ("frozen", "adapted", "worst 500"))
            console.print(f"{r['network']:20s} {r['stream']:36s} {numbers}", highlight=False)
    order = {job: i for i, job in enumerate(jobs)}
    rows.sort(key=lambda r: order[str(r["network"]), str(r["stream"])])
    settings: dict[str, object] = {"seed": options.seed, "severity": 5, "streams": len(jobs), "long_frames": LONG_FRAMES}
    columns = ["network", "stream", "frames", "frozen", "adapted", "difference", "worst 500", "last quarter", "shifts", "swaps"]
    return Result("field", rows, [*claims(rows), *_long_claims(rows)], columns, settings, quick=options.quick)


def streamed(network: str, stream: str, seed: int) -> dict[str, Cell]:
    """One row; also for one stream by hand."""
    images, labels = images_of(network)
    parts = (Part(LONG_FRAMES),) if stream == LONG else streams_for(NETWORKS[network].photographs)[stream]
    frames = frames_of(parts, images, labels, seed)
    return row(network, stream, Device(bundle_of(network)).run(frames.images), frames.labels)


def _long_claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    out = []
    for r in rows:
        if r["stream"] == LONG:
            lost, alarms = -number(r["difference"]), number(r["shifts"]) * FRAMES_A_WEEK / LONG_FRAMES
            text = f"{r['network']}: points lost over {LONG_FRAMES:,} clean frames"
            out.append(Claim(f"field.{r['network']}.long", text, round(lost, 3) + 0.0, "≤", 0.1, unit=" points"))
            r["alarms a week at 25 fps"] = round(alarms)
    return out


def plot(result: Result, path: Path) -> None:
    """Differences to the frozen model, a bar for each stream."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    networks = list(dict.fromkeys(str(r["network"]) for r in result.rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(5 * len(networks), 7), squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        mine = [r for r in result.rows if r["network"] == network]
        values = np.array([number(r["difference"]) for r in mine])
        axis.barh(range(len(mine)), values, color=["tab:red" if v < -1 else "tab:blue" for v in values])
        axis.set_yticks(range(len(mine)), [str(r["stream"]) for r in mine], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(-1, color="grey", linewidth=0.8, linestyle=":")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(network)
        axis.set_xlabel("accuracy, adapted minus frozen, points")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
