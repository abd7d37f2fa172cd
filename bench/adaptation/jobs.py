"""Runs rows over streams, several processes side by side, and keeps each finished piece so that a run can be resumed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.adaptation.rows import row_named
from bench.corrupt.streams import cache_folder, stream
from bench.parallel import one_core_each
from bench.result import console, progress
from refold.atomic import write_atomically
from refold.errors import RefoldError, StorageError

__all__ = ["Job", "Piece", "run_jobs"]

ROOT = Path(__file__).resolve().parents[2]
BASELINE_SOURCES = (
    *(f"bench/adaptation/{name}.py" for name in ("baselines", "cema", "method", "nets", "roid", "views")),
    "bench/corrupt",
    "demo/models.py",
)
REFOLD_SOURCES = ("bench/adaptation", "bench/corrupt", "demo/models.py", "refold", "edge", "cloud", "export")


@dataclass(frozen=True)
class Job:
    """One method, made fresh, led over one or more streams without a reset between them."""

    row: str
    protocol: str
    streams: tuple[str, ...]
    frames: int
    seed: int


@dataclass(frozen=True)
class Piece:
    """What one row did on one stream.

    Attributes:
        accuracy: share of online predictions that were right, in %; `last_quarter`: of the stream's last 25 %.
        counts: the method's own log.
    """

    row: str
    protocol: str
    stream: str
    frames: int
    accuracy: float
    last_quarter: float
    frames_uploaded: float
    bytes_up: float
    bytes_down: float
    seconds: float
    counts: dict[str, float]


def run_jobs(jobs: Iterable[Job], *, processes: int, resume: bool) -> list[Piece]:
    """Every job's pieces. Progress bars on the terminal; a job that fails on purpose ends the run with its sentence."""
    jobs = list(jobs)
    pieces: list[Piece] = []
    left = []
    for job in jobs:
        kept = _kept(job) if resume else None
        if kept is None:
            left.append(job)
        else:
            pieces += kept
    if len(left) < len(jobs):
        console.print(f"{len(jobs) - len(left)} of {len(jobs)} pieces were kept from an earlier run.", style="dim")
    with (
        progress() as bar,
        one_core_each(processes) as pool,
    ):
        task = bar.add_task("adaptation", total=sum(len(j.streams) * j.frames for j in jobs))
        bar.advance(task, sum(len(j.streams) * j.frames for j in jobs) - sum(len(j.streams) * j.frames for j in left))
        futures = {pool.submit(_run, job): job for job in left}
        try:
            for future in as_completed(futures):
                job = futures[future]
                found = future.result()
                pieces += found
                mean = sum(p.accuracy for p in found) / len(found)
                bar.console.print(
                    f"{job.row:20s} {job.protocol:10s} {job.streams[0] if len(job.streams) == 1 else 'all':18s} {mean:5.1f} %"
                    f"  {sum(p.seconds for p in found):6.1f} s",
                    highlight=False,
                )
                bar.advance(task, len(job.streams) * job.frames)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pieces


def _run(job: Job) -> list[Piece]:
    method = row_named(job.row).make(job.seed)
    pieces = []
    for name in job.streams:
        frames = stream(name, job.frames, seed=job.seed)
        started = time.perf_counter()
        predictions, log = method.run(frames.images, frames.labels)
        seconds = time.perf_counter() - started
        right = np.asarray(predictions) == frames.labels
        pieces.append(
            Piece(
                row=job.row,
                protocol=job.protocol,
                stream=name,
                frames=len(frames),
                accuracy=100 * float(right.mean()),
                last_quarter=100 * float(right[-(len(right) // 4) :].mean()),
                frames_uploaded=float(log["frames_uploaded"]),
                bytes_up=float(log["bytes_up"]),
                bytes_down=float(log["bytes_down"]),
                seconds=round(seconds, 2),
                counts={k: float(v) for k, v in log.items()},
            )
        )
    _keep(job, pieces)
    return pieces


def _path(job: Job) -> Path:
    """Named by the job and by the source it ran: a change of either is another piece."""
    row = row_named(job.row)
    key = hashlib.sha256(json.dumps([asdict(job), row.settings]).encode())
    for part in BASELINE_SOURCES if row.precision == "fp32" else REFOLD_SOURCES:
        path = ROOT / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            key.update(file.read_bytes())
    return cache_folder().parent / "bench" / f"adaptation-{job.row}-{key.hexdigest()[:24]}.json"


def _kept(job: Job) -> list[Piece] | None:
    try:
        return [Piece(**p) for p in json.loads(_path(job).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def _keep(job: Job, pieces: list[Piece]) -> None:
    path = _path(job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [json.dumps([asdict(p) for p in pieces], indent=1).encode()])
    except OSError as e:
        raise StorageError(f"A finished piece cannot be kept in {path.parent}: {e.strerror or e}.") from e
    except RefoldError:
        pass  # no room: the piece is in the result all the same
