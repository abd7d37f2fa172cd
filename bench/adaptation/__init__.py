"""Accuracy under shift: Refold's int8 device and cloud against published methods in fp32, on the same streams.

Student: ResNet-20. Streams: CIFAR-10-C at severity 5 and clean pictures, each in a shuffle of its own. Three protocols:

    reset       a fresh method for each corruption, 2,000 frames each (and for clean)
    continual   one method through all fifteen, never told that the corruption changed
    long        a fresh method, 10,000 frames of four corruptions; only the source, the best baseline and Refold's rows

Accuracy is online: a frame's prediction is made before the frame teaches anything. Of a method with tuned rows, the row that is
best under reset goes through the other protocols and into the comparison.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

from bench.adaptation.jobs import Job, Piece, run_jobs
from bench.adaptation.report import build, plot
from bench.adaptation.rows import ROWS, Row
from bench.corrupt import NAMES
from bench.result import Options, Result
from refold.errors import UsageError

__all__ = ["plot", "run"]

LONG = ("gaussian_noise", "glass_blur", "pixelate", "jpeg_compression")
QUICK = ("gaussian_noise", "fog", "contrast", "jpeg_compression")


def run(options: Options) -> Result:
    """Full: 15 x 2,000 frames and clean, continual, 4 x 10,000. Quick: 4 x 500 and clean, continual; published rows only."""
    names, frames = (QUICK, 500) if options.quick else (NAMES, 2000)
    rows = [r for r in ROWS if options.wants(r.name) and not (options.quick and r.name.endswith("-tuned"))]
    if not rows:
        raise UsageError(f"No row is called like {', '.join(options.only)}; there are {', '.join(r.name for r in ROWS)}.")
    reset = [Job(r.name, "reset", (n,), frames, options.seed) for r in rows for n in ("clean", *names)]
    pieces = run_jobs(reset, processes=options.processes, resume=options.resume)
    best = best_of_families(rows, pieces)
    further = [
        Job(r.name, "continual", tuple(names), frames, options.seed) for r in best if not r.stateless and r.kind != "bound"
    ]
    pieces += [
        replace(p, protocol="continual")
        for p in pieces
        if p.stream != "clean" and p.row in {r.name for r in best if r.stateless}
    ]
    if not options.quick:
        further += [Job(r.name, "long", (n,), 10_000, options.seed) for r in for_long_streams(best, pieces) for n in LONG]
    pieces += run_jobs(further, processes=options.processes, resume=options.resume)
    settings: dict[str, object] = {
        "student": "ResNet-20",
        "severity": 5,
        "frames": frames,
        "long_frames": 0 if options.quick else 10_000,
        "seed": options.seed,
        "streams": list(names),
        "rows": {r.name: f"{r.precision}, {r.settings}" for r in rows},
    }
    return build(rows, pieces, settings, quick=options.quick)


def reset_means(rows: list[Row], pieces: list[Piece]) -> dict[str, float]:
    """Mean accuracy over the reset streams, clean left out, by row."""
    reset = [p for p in pieces if p.protocol == "reset" and p.stream != "clean"]
    return {r.name: mean([p.accuracy for p in reset if p.row == r.name] or [0.0]) for r in rows}


def best_of_families(rows: list[Row], pieces: list[Piece]) -> list[Row]:
    """The row with the best mean of each family."""
    means = reset_means(rows, pieces)
    families = dict.fromkeys(r.family for r in rows)
    return [max((r for r in rows if r.family == f), key=lambda r: means[r.name]) for f in families]


def for_long_streams(rows: list[Row], pieces: list[Piece]) -> list[Row]:
    means = reset_means(rows, pieces)
    baselines = sorted((r for r in rows if r.kind == "baseline" and r.name != "source"), key=lambda r: means[r.name])
    return [r for r in rows if r.name == "source" or r.precision == "int8" or r in baselines[-1:]]
