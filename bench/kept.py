"""Pieces of a benchmark, each kept on disk when it is done, so that an interrupted run can go on.

A piece is a dataclass with the work it is of; work names a learning rate, and a piece its accuracy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from bench.corrupt.streams import cache_folder
from bench.parallel import executor
from bench.result import console, progress
from refold.atomic import write_atomically
from refold.errors import RefoldError

__all__ = ["Keeper", "best_of", "run_kept"]

W = TypeVar("W")
P = TypeVar("P")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Keeper:
    """Where a benchmark's pieces are kept: named by what was asked and by the source that answered, so that a change of either
    is another piece.

    Attributes:
        name: the benchmark's.
        sources: files and folders of the repository that decide what a piece is.
    """

    name: str
    sources: tuple[str, ...]

    def path(self, asked: object) -> Path:
        """Of the piece for `asked`, which JSON can hold."""
        told = json.dumps(asked, sort_keys=True)
        key = hashlib.sha256(told.encode() + _digest(self.sources)).hexdigest()[:24]
        return cache_folder().parent / "bench" / f"{self.name}-{key}.json"

    def load(self, asked: object) -> dict[str, Any] | None:
        """What was kept for `asked`; None where nothing readable was."""
        try:
            found = json.loads(self.path(asked).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def piece(self, asked: object, piece: Callable[..., P], work: Callable[..., object]) -> P | None:
        """The piece kept for `asked`, made of its fields and of those of its work; None where none was."""
        try:
            found = self.load(asked) or {}
            return piece(**{**found, "work": work(**found["work"])})
        except (TypeError, KeyError):
            return None

    def store(self, asked: object, content: dict[str, Any]) -> None:
        """Without room nothing is kept: the piece is in the result all the same."""
        path = self.path(asked)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [json.dumps(content).encode()])
        except (OSError, RefoldError):
            pass


@cache
def _digest(sources: tuple[str, ...]) -> bytes:
    key = hashlib.sha256()
    for part in sources:
        path = ROOT / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            key.update(file.read_bytes())
    return key.digest()


def run_kept(
    work: list[W],
    kept: Callable[[W], P | None] | None,
    run: Callable[[W], P],
    line: Callable[[P], str],
    title: str,
    *,
    processes: int,
) -> list[P]:
    """Every piece, in any order; one line each on the terminal.

    Args:
        work: what is to be done.
        kept: the piece that is there already; None: all are made anew.
        run: makes a piece; called in other processes where there are several, so it must be picklable.
        line: what to show of a piece.
        title: beside the bar.
        processes: how many pieces run at once; one runs in this process.
    """
    known = [(w, kept(w) if kept else None) for w in work]
    pieces = [p for _, p in known if p is not None]
    left = [w for w, p in known if p is None]
    if pieces:
        console.print(f"{len(pieces)} of {len(work)} pieces were kept from an earlier run.", style="dim")
    with progress() as bar, executor(processes) as pool:
        task = bar.add_task(title, total=len(work), completed=len(pieces))

        def told(piece: P) -> None:
            bar.console.print(line(piece), highlight=False)
            bar.advance(task)
            pieces.append(piece)

        if processes == 1:  # a piece runs when it is submitted
            for w in left:
                told(pool.submit(run, w).result())
        else:
            for future in as_completed([pool.submit(run, w) for w in left]):
                told(future.result())
    return pieces


def best_of(tried: Iterable[tuple[float, float]]) -> float:
    """The rate with the best mean accuracy.

    Args:
        tried: rate and accuracy of each piece.

    Raises:
        ValueError: there is none.
    """
    found: dict[float, list[float]] = {}
    for rate, accuracy in tried:
        found.setdefault(rate, []).append(accuracy)
    return max(found, key=lambda rate: mean(found[rate]))
