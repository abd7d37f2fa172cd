"""The whole run: write the models, see that engines agree, measure, remove."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from bench.experts import longrun, quality
from bench.experts.cgroup import Caps
from bench.experts.checkpoint import Files, Words, check_space, sizes, write_bundle, write_folder, write_gguf, write_paths
from bench.experts.claims import ablation, claims
from bench.experts.journal import Journal
from bench.experts.lines import ALLOWANCE, RECALL, Line, Plan, plan
from bench.experts.llama import available
from bench.experts.measure import Run, Runner
from bench.experts.replayed import curves
from bench.experts.rows import COLUMNS, rows
from bench.experts.shape import OLMOE, QUICK, Shape
from bench.experts.trace import PUBLIC, SEED, routing, statistics
from bench.experts.verify import verified
from bench.machine import commit
from bench.result import Cell, Claim, Options, Result, console, progress
from refold.errors import UsageError

__all__ = ["run"]


def run(options: Options) -> Result:
    """Full: OLMoE's shape at 4 and 8 bits, 1 to 5 runs a line. Quick: a small shape, one run, each program once."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that groups and gigabytes go, as after Ctrl-C
    shape = QUICK if options.quick else OLMOE
    words, whole = Words.of(shape), plan(shape, options.quick)
    chosen, skipped = _chosen(whole, options)
    caps = Caps.find()
    journal = Journal(options.target.with_suffix(".runs.jsonl"), shape, chosen, commit(), options.resume)
    found: list[Run] = []
    checked: list[dict[str, Cell]] = []
    extra: list[Claim] = []
    own: dict[int, dict[str, int]] = {}
    with _work(options) as folder, progress() as bar:
        task = bar.add_task("trained models", total=sum(line.runs for line in chosen.lines) + 1)
        more, held = quality.measured(folder, options, lambda what: bar.update(task, description=what))
        bar.advance(task)
        long = (longrun.line_of(whole),) if options.minutes and options.wants(longrun.NAME) else ()
        for bits in sorted({line.bits for line in (*chosen.lines, *long)}):
            part = replace(chosen, lines=tuple(line for line in chosen.lines if line.bits == bits))
            runner = Runner(shape, part, Files(folder, bits), caps)
            last = tuple(line for line in long if line.bits == bits)
            if not journal.has_all(part.lines) or last:
                _write(runner, words, bar)
                bar.update(task, description=f"{bits} bits: the same experts in every engine?")
                checked += verified(runner, words, {line.name: line for line in part.lines if line.share is None})
                runner.learn_own((*part.lines, *last), lambda what: bar.update(task, description=what))
            for run in _interleaved(runner, journal):
                found.append(run)
                bar.update(task, advance=1, description=run.line.title)
                _log(run)
            for line in last:
                bar.update(task, description=f"{options.minutes:g} minutes at 25 %")
                told, of_it = longrun.measured(runner, line, options.minutes)
                checked.append(told)
                extra += of_it
            own[bits] = runner.own
            if not options.keep:
                runner.files.remove()
    measured = rows(found, words, chosen)
    others = [_noted(r) for r in (*ablation(measured), *checked, *more)]
    others += [{"engine": name, "note": f"skipped: {why}"} for name, why in skipped.items()]
    every = [*measured, *others]
    settings = _settings(shape, words, chosen, caps, own) | {
        "read-ahead KiB": next((run.read_ahead for run in found if run.read_ahead), None),
        "replay": curves(words, options.quick),
    }  # fmt: skip
    journal.remove()
    return Result("experts", every, [*claims(measured), *extra, *held], COLUMNS, settings, options.quick)


def _chosen(whole: Plan, options: Options) -> tuple[Plan, dict[str, str]]:
    """The lines that --only wants and that this machine has the programs for; why others are left out."""
    skipped: dict[str, str] = {}
    if reason := available():
        skipped["llama.cpp"] = reason
    if not options.quick:
        skipped["accelerate, disk"] = "bfloat16 experts of this shape are 12.9 GB, read whole for every token; see --quick"
    lines = [line for line in whole.lines if options.wants(line.name) and not (line.kind == "llama" and reason)]
    parts = [*quality.PARTS, *([longrun.NAME] if options.minutes else [])]
    if not lines and not any(map(options.wants, parts)):
        names = ", ".join([*_names(whole.lines), *parts])
        raise UsageError(f"No line is called like {', '.join(options.only)}; there are {names}.")
    return replace(whole, lines=tuple(lines)), skipped


def _names(lines: tuple[Line, ...]) -> list[str]:
    return list(dict.fromkeys(line.name for line in lines))


@contextmanager
def _work(options: Options) -> Iterator[Path]:
    """The folder of the models: --work, or one beside the result; gone afterwards unless --keep."""
    parent = options.work or options.target.parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="refold-bench-experts-", dir=parent))
    try:
        yield folder
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _write(runner: Runner, words: Words, bar: Progress) -> None:
    shape, files, bits = runner.shape, runner.files, runner.files.bits
    check_space(files.folder, sizes(shape, bits))
    kinds = {line.kind for line in runner.plan.lines}
    writers: list[tuple[Path, Callable[..., None], bool]] = [
        (files.bundle, write_bundle, True), (files.gguf, write_gguf, "llama" in kinds),
        (files.safetensors, write_folder, "accelerate" in kinds),
    ]  # fmt: skip
    for path, write, wanted in writers:
        if wanted:
            task = bar.add_task(f"writing {path.name}", total=shape.routed * (3 if path is files.gguf else 1))
            write(path, words, bits, lambda _, task=task: bar.advance(task))
            bar.remove_task(task)
    if any(line.options.get("learnt") for line in runner.plan.lines):
        write_paths(files, words)


def _interleaved(runner: Runner, journal: Journal) -> Iterator[Run]:
    """Round after round, each beginning with another line, so that a machine whose speed drifts slows all alike."""
    lines = runner.plan.lines
    for number in range(max((line.runs for line in lines), default=0)):
        turn = [line for line in lines if line.runs > number]
        start = number * 5 % len(turn)
        for line in turn[start:] + turn[:start]:
            run = journal.known(line, number)
            if run is None:
                run = runner.run(line, number)
                journal.note(run, number)
            yield run


def _noted(row: dict[str, Cell]) -> dict[str, Cell]:
    """What the table has no column for goes into the note, so that the terminal shows it."""
    rest = [f"{k} {v}" for k, v in row.items() if k not in COLUMNS and v not in (None, "")]
    return row | {"note": "; ".join(filter(None, [str(row.get("note") or ""), *rest]))}


def _log(run: Run) -> None:
    """A line for each run where no bar can be seen: the full run takes most of an hour."""
    if not console.is_terminal:
        out = run.outcome
        console.print(f"{run.line.title}: {run.note if out is None else f'{len(out.times) / sum(out.times):.3g} tokens/s'}")


def _settings(shape: Shape, words: Words, chosen: Plan, caps: Caps, own: dict[int, dict[str, int]]) -> dict[str, object]:
    olmoe = words.trace if shape is OLMOE else routing(4, 64, 8, 1024)
    return {
        "shape": shape.config(), "expert bytes": {b: shape.expert_bytes(b) for b in (4, 8)},
        "resident bytes": shape.resident_bytes, "warm tokens": chosen.warm, "tokens": chosen.tokens,
        "trace seed": SEED, "trace, 64 experts of which 8": statistics(olmoe), "OLMoE, published": PUBLIC,
        "look-ahead recall": RECALL, "cap": "share of expert bytes + own + allowance", "own bytes": own,
        "allowance bytes": ALLOWANCE[shape.name], "caps": caps.reason or f"{caps.root}", "llama.cpp": available() or "0.3.36",
        "threads": {"refold": "1 and 2 readers", "llama.cpp": 2, "accelerate": 2}, "batch": 1,
    }  # fmt: skip
