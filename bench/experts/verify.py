"""Before anything is timed: do both engines use the experts that the trace says, and say the same words?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.experts.checkpoint import Words
from bench.experts.job import Job, Outcome
from bench.experts.lines import LLAMA_RESIDENT, RESIDENT, Line
from bench.experts.measure import Runner
from bench.result import Cell
from refold.errors import ModelError

__all__ = ["TOKENS", "equality", "verified"]

TOKENS = 16


def equality(found: list[list[list[int]]], words: Words, first: int = 0) -> float:
    """Share of (token, layer) whose experts are the trace's, as a set."""
    wanted = words.trace[first : first + len(found)].tolist()
    same = [set(a) == set(b) for t, told in zip(wanted, found, strict=True) for a, b in zip(t, told, strict=True)]
    return sum(same) / len(same)


def verified(runner: Runner, words: Words, lines: Mapping[str, Line]) -> list[dict[str, Cell]]:
    """One row for each engine without a cap: top-k equality, words said right, how far llama.cpp's logits are from ours. The
    runner learns from these runs what the engines need besides experts.

    Raises:
        ModelError: an engine uses other experts than the trace says: nothing it does could be compared.
    """
    out: list[dict[str, Cell]] = []
    logits: dict[str, np.ndarray] = {}
    for name in (RESIDENT, LLAMA_RESIDENT):
        if name not in lines:
            continue
        outcome, kept = _watched(runner, lines[name])
        runner.learn(lines[name], outcome)
        logits[name] = kept
        share = equality(outcome.routing, words)
        if share < 1:
            raise ModelError(
                f"{name} uses the trace's experts in {100 * share:.2f} % of cases, not in all: nothing is comparable."
            )
        row: dict[str, Cell] = {"engine": f"verify: {name}", "bits": lines[name].bits, "top-k equal": share}
        row["right %"] = 100 * outcome.right / len(outcome.times)
        out.append(row)
    if len(logits) == 2:
        ours, theirs = logits[RESIDENT], logits[LLAMA_RESIDENT]
        out[-1]["logits apart"] = round(float(np.abs(ours - theirs).max() / np.abs(ours).max()), 5)
        out[-1]["same word %"] = 100 * float((ours.argmax(1) == theirs.argmax(1)).mean())
    return out


def _watched(runner: Runner, line: Line) -> tuple[Outcome, np.ndarray]:
    keep = Path(runner.files.folder) / f"logits-{line.kind}.npy"
    job: Job = dataclasses.replace(
        runner.job(line, 0, 0, TOKENS), options={**line.options, "routing": 1}, logits=TOKENS, keep=str(keep)
    )
    run = runner.measured(line, job)
    if run.outcome is None:
        raise ModelError(f"{line.title} does not run: {run.note}")
    kept = np.load(keep)
    keep.unlink()
    return run.outcome, kept
