"""Runs lines: each run a fresh process in a control group of its own, the disk's rate taken just before and just after."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bench.experts.cgroup import Caps, Finished, cap_bytes
from bench.experts.checkpoint import Files
from bench.experts.disk import evict, rate, read_ahead, resident
from bench.experts.job import Job, Outcome
from bench.experts.lines import ALLOWANCE, Line, Plan
from bench.experts.shape import Shape
from refold.errors import StorageError

__all__ = ["Run", "Runner", "by_line"]

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 900.0  # seconds a run may take


@dataclass(frozen=True)
class Run:
    """One run. outcome: None where the process failed, and `note` says how. rate: bytes per second of the disk around it.
    read_ahead: KiB that the kernel read beyond a page; None where the disk does not say. own: bytes of anonymous memory that
    such an engine takes besides experts, measured in a run of its own without a cap."""

    line: Line
    first: int
    cap: int
    rate: float
    finished: Finished | None
    outcome: Outcome | None
    note: str = ""
    read_ahead: int | None = None
    own: int = 0


@dataclass
class Runner:
    """What all runs share.

    Attributes:
        own: bytes an engine needs besides experts, by kind: anonymous memory, and its resident weights where those are mapped.
        read_ahead: KiB that the kernel read beyond a page, last time.
    """

    shape: Shape
    plan: Plan
    files: Files
    caps: Caps
    own: dict[str, int] = field(default_factory=dict)
    read_ahead: int | None = None

    def run(self, line: Line, number: int) -> Run:
        """Run `number` of a line: the words it begins with are another part of the trace each time."""
        length = self.plan.warm + self.plan.tokens
        first = number * length % (self.shape.tokens - length)
        return self.measured(line, self.job(line, first, *(line.short or (self.plan.warm, self.plan.tokens))))

    def job(self, line: Line, first: int, warm: int, tokens: int) -> Job:
        model = str(getattr(self.files, line.model))
        return Job(line.kind, model, first, warm, tokens, line.budget(self.shape), dict(line.options))

    def measured(self, line: Line, job: Job, longest: float = LONGEST) -> Run:
        cap = self.cap(line)
        if line.share is not None and self.caps.reason:
            return Run(line, job.first, cap, 0.0, None, None, f"skipped: {self.caps.reason}")
        before = self._rate(line, 2 * job.first)
        finished = self.child(job, None if line.share is None else cap, longest)
        after = self._rate(line, 2 * job.first + 1)
        outcome, note = _outcome(finished)
        own = self.own.get(_owner(line), 0)
        return Run(line, job.first, cap, (before + after) / 2, finished, outcome, note, self.read_ahead, own)

    def cap(self, line: Line) -> int:
        """Bytes; 0: none."""
        if line.share is None:
            return 0
        kind = "paged" if line.like else _owner(line)
        experts = self.shape.expert_bytes(line.bits) * (4 if line.kind == "accelerate" else 1)
        return cap_bytes(line.share, experts, self.own.get(kind, 0), ALLOWANCE[self.shape.name])

    def learn_own(self, lines: tuple[Line, ...], told: Callable[[str], None]) -> None:
        """Measures, without a cap, what each kind of engine needs besides experts, where nothing has told it yet."""
        for line in lines:
            kind = _owner(line)
            if kind in self.own:
                continue
            told(f"{kind}: memory besides experts")
            outcome, note = _outcome(self.child(self.job(line, 0, 6, 6), None, LONGEST))
            if outcome is None:
                raise StorageError(f"{line.title} does not run even without a cap: {note}")
            self.learn(line, outcome)

    def learn(self, line: Line, outcome: Outcome) -> None:
        """From a run without a cap."""
        self.own[_owner(line)] = 1024 * outcome.status["RssAnon"] - outcome.cached
        if line.kind == "llama":
            self.own["llama"] += self.shape.resident_bytes

    def child(self, job: Job, cap: int | None, longest: float) -> Finished:
        """Raises nothing: whatever happens to the child is in the answer."""
        self.drop()
        command = [sys.executable, "-m", "bench.experts.child", job.to_json()]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        with read_ahead(self.files.folder) as self.read_ahead:
            if self.caps.reason:
                return _alone(command, environment, longest)
            with self.caps.group() as group:
                group.limit(cap)
                return group.run(command, environment, longest)

    def drop(self) -> None:
        """No engine finds pages of its model in the cache, its own or charged to a group that is gone; each finds its code."""
        resident(_code())
        for path in (self.files.bundle, self.files.gguf, *self.files.safetensors.rglob("*.*")):
            if path.is_file():
                evict(path)

    def _rate(self, line: Line, seed: int) -> float:
        total = (128 << 20) if self.shape.name == "OLMoE" else (64 << 20)
        path = next((p for p in (self.files.bundle, self.files.gguf) if p.is_file()), None)
        return rate(path, self.shape.record(line.bits), total, seed=seed) if path else 0.0


@cache
def _code() -> tuple[Path, ...]:
    """The shared libraries of all engines."""
    roots = [find_spec(name) for name in ("torch", "numpy", "llama_cpp")]
    folders = [Path(f) for spec in roots if spec is not None for f in spec.submodule_search_locations or ()]
    return tuple(path for folder in folders for path in folder.rglob("*.so*") if path.is_file() and not path.is_symlink())


def _owner(line: Line) -> str:
    """Whose memory besides experts a line has: accelerate runs the same Python, torch and model as we do."""
    return "llama" if line.kind == "llama" else "paged"


def _outcome(finished: Finished) -> tuple[Outcome | None, str]:
    if finished.killed:
        return None, "killed: out of memory"
    if finished.code == 0 and finished.output.strip():
        return Outcome.from_json(finished.output.strip().splitlines()[-1]), ""
    words = finished.errors.strip().splitlines()
    return None, f"ended with {finished.code}: {words[-1][:160] if words else 'no word'}"


def _alone(command: list[str], environment: dict[str, str], longest: float) -> Finished:
    """Without a group: no cap, and memory only as the process itself tells it."""
    import subprocess

    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=longest, check=False)
    except subprocess.TimeoutExpired:
        return Finished(-1, "", f"ended after {longest:.0f} s", 0, 0, 0)
    return Finished(done.returncode, done.stdout, done.stderr, 0, 0, 0)


def by_line(runs: list[Run]) -> list[tuple[Line, list[Run]]]:
    """Lines in the order of their first run, each with all of its runs."""
    found = defaultdict[str, list[Run]](list)
    for run in runs:
        found[run.line.title].append(run)
    return [(rs[0].line, rs) for rs in found.values()]
