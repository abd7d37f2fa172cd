"""Each run as a line of a file beside the result, so that `--resume` goes on where an interrupted hour ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.experts.cgroup import Finished
from bench.experts.job import Outcome
from bench.experts.lines import Line, Plan
from bench.experts.measure import Run
from bench.experts.shape import Shape
from refold.append import append_line
from refold.atomic import write_atomically

__all__ = ["Journal"]


class Journal:
    """Args:
    path: the file. resume: keep what a run of the same code, shape and plan has left there; otherwise it begins anew.
    """

    def __init__(self, path: Path, shape: Shape, plan: Plan, commit: str, resume: bool) -> None:
        self.path = path
        self._head = {"shape": asdict(shape), "warm": plan.warm, "tokens": plan.tokens, "commit": commit}
        self._done: dict[tuple[str, int], dict[str, object]] = {}
        if resume:
            self._done = self._read()
        if not self._done:
            write_atomically(path, [json.dumps(self._head).encode() + b"\n"])

    def _read(self) -> dict[tuple[str, int], dict[str, object]]:
        """A last line that was cut off is left out, and cut off."""
        try:
            head, *rest = self.path.read_text().splitlines()
            if json.loads(head) != self._head:
                return {}
        except (OSError, ValueError):
            return {}
        found, whole = {}, [head]
        for line in rest:
            try:
                told = json.loads(line)
                found[told["title"], told["number"]] = told
            except (ValueError, KeyError, TypeError):
                break
            whole.append(line)
        write_atomically(self.path, [("\n".join(whole) + "\n").encode()])
        return found

    def has_all(self, lines: Sequence[Line]) -> bool:
        return all((line.title, number) in self._done for line in lines for number in range(line.runs))

    def known(self, line: Line, number: int) -> Run | None:
        told = self._done.get((line.title, number))
        if told is None:
            return None
        finished, outcome = told["finished"], told["outcome"]
        return Run(
            line, int(str(told["first"])), int(str(told["cap"])), float(str(told["rate"])),
            None if finished is None else Finished(**finished),  # type: ignore[arg-type]
            None if outcome is None else Outcome(**outcome),  # type: ignore[arg-type]
            str(told["note"]), told["read-ahead"], int(str(told["own"])),  # type: ignore[arg-type]
        )  # fmt: skip

    def note(self, run: Run, number: int) -> None:
        """What a process printed is not kept: its outcome is."""
        finished = None if run.finished is None else asdict(run.finished) | {"output": "", "errors": ""}
        told = {
            "title": run.line.title, "number": number, "first": run.first, "cap": run.cap, "rate": run.rate, "note": run.note,
            "read-ahead": run.read_ahead, "own": run.own, "finished": finished,
            "outcome": None if run.outcome is None else asdict(run.outcome),
        }  # fmt: skip
        append_line(self.path, json.dumps(told).encode())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
