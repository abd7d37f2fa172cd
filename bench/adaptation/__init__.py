"""Accuracy under shift: Refold's int8 device and cloud against published methods in fp32, on the same streams.

Student: ResNet-20. Streams: CIFAR-10-C at severity 5 and clean pictures, each in a shuffle of its own. Three protocols:

    reset       a fresh method for each corruption, 2,000 frames each (and for clean)
    continual   one method through all fifteen, never told that the corruption changed
    long        a fresh method, 10,000 frames of four corruptions

Accuracy is online: a frame's prediction is made before the frame teaches anything. Every baseline row goes through every
protocol, and Refold is compared with whichever is best there; of CEMA, whose teacher takes ten times as long as all else, only
the row that is best under reset goes on.
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

CEMA = "cema-paper"  # a family: its presets and tuned rows
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
    stateless = {r.name for r in rows if r.stateless}
    pieces += [replace(p, protocol="continual") for p in pieces if p.stream != "clean" and p.row in stateless]
    going_on = [r for r in rows if r.name != "oracle" and (r.family != CEMA or r is best_of(CEMA, rows, pieces))]
    learning = [r for r in going_on if not r.stateless and r.kind != "bound"]
    further = [Job(r.name, "continual", tuple(names), frames, options.seed) for r in learning]
    if not options.quick:
        further += [Job(r.name, "long", (n,), 10_000, options.seed) for r in going_on for n in LONG]
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


def best_of(family: str, rows: list[Row], pieces: list[Piece]) -> Row:
    """The row of a family with the best mean over the reset streams, clean left out. Raises ValueError where there is none."""

    def reset_mean(row: Row) -> float:
        found = [p.accuracy for p in pieces if (p.row, p.protocol) == (row.name, "reset") and p.stream != "clean"]
        return mean(found) if found else 0.0

    return max((r for r in rows if r.family == family), key=reset_mean)
