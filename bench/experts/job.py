"""What a child process is told to run, and what it tells: one JSON each way.

Every engine runs the same loop (`drive`): the words of the trace one after another, each timed, so that a token costs the same
work everywhere. Bytes come from /proc/self/io (what the block device gave, page cache or not), memory from /proc/self/status.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["TEXT", "Job", "Outcome", "Step", "drive", "memory"]

F32 = NDArray[np.float32]
Step = Callable[[int], F32]
TEXT = 128  # words of a text in a long run: at 1,024, keys and values of OLMoE's shape are 268 MB


@dataclass(frozen=True)
class Job:
    """One run of one engine.

    Attributes:
        engine: a name of bench.experts.engines. model: the file it runs.
        first: the word to begin with. warm: tokens before the clock starts. tokens: timed ones.
        budget: bytes for experts; 0 where the engine leaves that to the kernel.
        options: an engine's own, such as policy and recall.
        seconds: go on through the trace again and again for so long, and report memory meanwhile; 0: only `tokens`.
        logits: keep the logits of so many words for comparison, in the file `keep`.
    """

    engine: str
    model: str
    first: int
    warm: int
    tokens: int
    budget: int = 0
    options: dict[str, float | int | str | bool] = field(default_factory=dict)
    seconds: float = 0.0
    logits: int = 0
    keep: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


@dataclass
class Outcome:
    """Of the timed tokens unless said otherwise.

    Attributes:
        times: seconds of each. right: tokens whose likeliest successor was the trace's. read: bytes from the block device.
        load_seconds: until the first token could start. status: kB by /proc/self/status at the end.
        hits, misses, stall: of the pager; -1 where the kernel pages. cached: bytes of records in memory at the end.
        slots: records that fit the budget. details: an engine's own.
        memory: (seconds, kB anonymous, kB resident, file descriptors) through a long run, always as many words into a text:
            its keys and values grow and go. Resident counts libraries' pages too, which the kernel takes and gives back.
    """

    times: list[float]
    right: int
    read: int
    load_seconds: float
    status: dict[str, int]
    hits: int = -1
    misses: int = -1
    stall: float = -1.0
    cached: int = 0
    slots: int = 0
    details: dict[str, float | int | str] = field(default_factory=dict)
    memory: list[tuple[float, int, int, int]] = field(default_factory=list)
    routing: list[list[list[int]]] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


def memory(pid: str = "self") -> dict[str, int]:
    """kB: VmHWM, VmRSS, RssAnon, RssFile."""
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in lines) if k in wanted}


def device_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(v) for k, _, v in (line.partition(":") for line in lines) if k == "read_bytes")


def drive(job: Job, step: Step, words: int, load_seconds: float, started: Callable[[], None] = lambda: None) -> Outcome:
    """Warm-up, then the timed words.

    Args:
        step: takes a word's number, gives float32 (vocabulary,) logits of what follows.
        words: of the vocabulary; the trace begins again after its last.
        started: called when the clock starts, to reset an engine's counters.
    """
    at, kept = job.first, []
    for i in range(job.warm):
        logits = step((at + i) % words)
        if i < job.logits:
            kept.append(np.array(logits, np.float32))
    at += job.warm
    started()
    read, right, times, seen = device_bytes(), 0, list[float](), list[tuple[float, int, int, int]]()
    begun = time.perf_counter()
    while len(times) < job.tokens or time.perf_counter() - begun < job.seconds:
        word = at % words
        before = time.perf_counter()
        logits = step(word)
        now = time.perf_counter()
        times.append(now - before)
        right += int(np.argmax(logits)) == (word + 1) % words
        if len(kept) < job.logits:
            kept.append(np.array(logits, np.float32))
        at += 1
        if job.seconds and len(times) % TEXT == 0:
            kb, files = memory(), len(list(Path("/proc/self/fd").iterdir()))
            seen.append((round(now - begun, 1), kb["RssAnon"], kb["VmRSS"], files))
    if job.keep:
        np.save(job.keep, np.stack(kept))
    return Outcome(times, right, device_bytes() - read, load_seconds, memory(), memory=seen)
