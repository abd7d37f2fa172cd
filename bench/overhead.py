"""What the daemon costs beside a bare ONNX Runtime session of the same int8 file, at batch 1.

The daemon runs with everything on (source, preprocessing, adaptation with taps, selector, outbox, predictions, status file),
the bare session gets one ready input again and again. Blocks of both alternate in one process without torch; `ratio` is the
median frame against the median run, `block ratio` the time of whole blocks. Then releases are applied from another thread while
frames go on, and kept images are measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.bundles import Subject, subject
from bench.result import Cell, Claim, Options, Result, number, progress, stage
from refold.errors import RefoldError, UsageError

__all__ = ["claims", "plot", "run"]

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = {"resnet20": 500, "mobilenetv2": 60, "resnet50": 16}  # frames of one timed block
# Bar and goal of the ratio. MobileNetV2 at 224x224 has none: turning 150,000 bytes into floats alone is 4 % of its 3.5 ms.
BARS: dict[str, tuple[float, float | None]] = {"resnet20": (1.15, None), "resnet50": (1.03, 1.02)}


def run(options: Options) -> Result:
    """Full: three nets, 11 pairs of blocks, 50 swaps each. Quick: ResNet-20 and MobileNetV2, 5 pairs, 10 swaps."""
    nets = [n for n in BLOCKS if options.wants(n) and not (options.quick and n == "resnet50")]
    if not nets:
        raise UsageError(f"No net is called like {', '.join(options.only)}; there are {', '.join(BLOCKS)}.")
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="refold-bench-") as folder, progress() as bar:
        for name in nets:
            task = bar.add_task(f"{name}: export", total=None)
            net = subject(name, Path(folder), stage(bar, task, name))
            frames = Path(folder) / f"{name}.npz"
            np.savez(frames, images=net.frames(64 if net.net.side == 32 else 16))
            pairs, swaps = (5, 10) if options.quick else (11, 50)
            block = BLOCKS[name]
            settings = {"pairs": pairs, "frames": block, "swaps": swaps}

            def advance(done: int, of: int, name: str = name, task: Any = task) -> None:
                bar.update(task, description=f"{name}: frames", completed=done, total=of)

            figures = _child("time", net, frames, settings, advance)
            kinds = ("bare", "daemon", "measured")
            memory = {what: _child("memory", net, frames, {"what": what, "frames": block}, None) for what in kinds}
            rows.append(_row(name, net, figures, memory))
    columns = [
        "net",
        "side",
        "bare ms",
        "daemon ms",
        "ratio",
        "block ratio",
        "cpu ratio",
        "p99 steady ms",
        "p99 swapping ms",
        "p99 ratio",
    ]
    columns += [
        "swaps",
        "apply ms",
        "measurement s",
        "p99 measuring ratio",
        "frames lost",
        "bare MB",
        "daemon MB",
        "measured MB",
    ]
    return Result("overhead", rows, claims(rows), columns, {"threads": 1, "batch": 1}, options.quick)


def _child(mode: str, net: Subject, frames: Path, settings: dict[str, Any], advance: Any) -> dict[str, Any]:
    """Runs the measured process and reads its lines."""
    command = [sys.executable, "-m", "bench.device", mode, str(net.path), str(frames), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        figures: dict[str, Any] = {}
        for line in process.stdout:
            figures = json.loads(line)
            if advance is not None and "done" in figures:
                advance(figures["done"], figures["of"])
        said = process.stderr.read()
    if process.returncode or not figures or "done" in figures:
        reason = said.strip().splitlines()[-1] if said.strip() else f"exit {process.returncode}"
        raise RefoldError(f"The measured process ended early: {reason}.", code="device", detail=said)
    return figures


def _row(name: str, net: Subject, figures: dict[str, Any], memory: dict[str, dict[str, Any]]) -> dict[str, Cell]:
    f: dict[str, Any] = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    return {
        "net": name,
        "side": net.bundle.preprocess.width,
        "bare ms": f["bare_ms"],
        "daemon ms": f["daemon_ms"],
        "ratio": f["ratio"],
        "ratio min": min(f["ratios"]),
        "ratio max": max(f["ratios"]),
        "block ratio": f["block_ratio"],
        "cpu ratio": f["cpu_ratio"],
        "integer layers": f["integer_layers"],
        "expected integer layers": f["expected_integer_layers"],
        "swaps": f["swaps"],
        "apply ms": f["apply_ms"],
        "p50 steady ms": f["p50_steady_ms"],
        "p99 steady ms": f["p99_steady_ms"],
        "p50 swapping ms": f["p50_swapping_ms"],
        "p99 swapping ms": f["p99_swapping_ms"],
        "p99 ratio": f["p99_ratio"],
        "max swapping ms": f["max_swapping_ms"],
        "frames": f["frames"],
        "frames lost": f["frames_lost"],
        "frames while swapping": f["frames_while_swapping"],
        "bare MB": round(memory["bare"]["resident_mb"], 1),
        "daemon MB": round(memory["daemon"]["resident_mb"], 1),
        "measured MB": round(memory["measured"]["resident_mb"], 1),
        "images measured": f["images_measured"],
        "measurement s": f["measurement_s"],
        "p99 measuring ms": f["p99_measuring_ms"],
        "p99 measuring ratio": f["p99_measuring_ratio"],
        "frames while measuring": f["frames_while_measuring"],
        **{f"daemon {k}": v for k, v in figures["metrics"].items()},
    }


def claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    """Issue 2, "Shows" 4."""
    out = []
    for row in rows:
        net = str(row["net"])
        if net in BARS:
            text = f"{net}, {row['side']}x{row['side']}: daemon's frame path ÷ bare ONNX Runtime run, batch 1"
            out.append(Claim(f"overhead.{net}.ratio", text, number(row["ratio"]), "≤", *BARS[net]))
        text = f"{net}: p99 from frame to frame over {row['swaps']} swaps ÷ steady"
        out.append(Claim(f"overhead.{net}.p99", text, number(row["p99 ratio"]), "≤", 1.5))
        text = f"{net}: p99 from frame to frame while {row['images measured']} kept images are measured ÷ steady"
        out.append(Claim(f"overhead.{net}.measuring", text, number(row["p99 measuring ratio"]), "≤", 1.5))
        out.append(Claim(f"overhead.{net}.lost", f"{net}: frames lost", number(row["frames lost"]), "≤", 0))
    return out


def plot(result: Result, path: Path) -> None:
    """Ratio of each net with its bar, and latency percentiles with and without swaps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [str(r["net"]) for r in result.rows]
    ratios = [number(r["ratio"]) for r in result.rows]
    spread = [
        [max(0.0, r - number(row["ratio min"])) for r, row in zip(ratios, result.rows, strict=True)],
        [max(0.0, number(row["ratio max"]) - r) for r, row in zip(ratios, result.rows, strict=True)],
    ]
    left.bar(names, ratios, yerr=spread, color="#1f6feb", capsize=4)
    for i, name in enumerate(names):
        if name in BARS:
            left.hlines(BARS[name][0], i - 0.45, i + 0.45, color="#d0342c", linestyle="--")
    left.set_ylim(0.95, max([*ratios, 1.15]) + 0.05)
    left.set_ylabel("daemon ÷ bare session (dashed: bar)")
    for shift, key in ((-0.2, "steady"), (0.2, "swapping")):
        places = [i + shift for i in range(len(names))]
        values = [number(r[f"p99 {key} ms"]) / max(number(r["p50 steady ms"]), 1e-9) for r in result.rows]
        right.bar(places, values, 0.4, label=f"p99 {key}")
    right.set_xticks(range(len(names)), names)
    right.set_ylabel("÷ steady median")
    right.legend()
    figure.suptitle("The daemon's cost at batch 1, one thread")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
