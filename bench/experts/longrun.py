"""Minutes of generation at 25 %: does memory stay flat, do files stay closed?"""

from __future__ import annotations

import dataclasses

from bench.experts.claims import of_long_run
from bench.experts.lines import OURS, Line, Plan
from bench.experts.measure import Runner
from bench.result import Cell, Claim

__all__ = ["NAME", "line_of", "measured"]

NAME = "long run"
FLAT = 512.0  # kB a minute; a leak of one record in ten minutes would be 350


def line_of(plan: Plan) -> Line:
    return next(line for line in plan.lines if line.name == OURS and line.share == 0.25)


def measured(runner: Runner, line: Line, minutes: float) -> tuple[dict[str, Cell], list[Claim]]:
    job = dataclasses.replace(runner.job(line, 0, runner.plan.warm, runner.plan.tokens), seconds=60 * minutes)
    run = runner.measured(line, job, longest=60 * minutes + 600)
    row: dict[str, Cell] = {"engine": f"{NAME}, {minutes:g} minutes", "cap %": 25.0, "bits": line.bits, "note": run.note}
    slope, files = float("nan"), float("nan")
    if run.outcome is not None and run.finished is not None:
        out = run.outcome
        slope, resident, files = of_long_run(out.memory)
        row |= {
            "tokens/s": round(len(out.times) / sum(out.times), 3), "tokens": len(out.times), "kB/minute": slope,
            "resident kB/minute": resident, "kB at": " ".join(f"{kb}" for _, kb, _, _ in out.memory),
            "files grown": files, "right %": round(100 * out.right / len(out.times), 2), "OOM": run.finished.killed,
            "hit": round(out.hits / max(1, out.hits + out.misses), 4), "peak MB": round(run.finished.peak / 1e6, 1),
            "cap MB": round(run.cap / 1e6, 1),
        }  # fmt: skip
    text = f"{minutes:g} minutes at 25 %"
    return row, [
        Claim("experts.long.memory", f"{text}: growth of anonymous memory", slope, "≤", FLAT, 0.0, " kB/minute"),
        Claim("experts.long.files", f"{text}: open files grown by", files, "≤", 0),
    ]
