"""`refold export search`: the best configuration of a supernet within a budget."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from export.elastic.choose import Candidate, Choice, choose
from export.elastic.deliver import Workshop, given_of
from export.elastic.folder import RunFolder
from export.elastic.latency import SAME_FOR_ALL, Latencies, measure_latency
from export.elastic.plots import pareto, predicted_against_measured
from export.elastic.search import Budget, Evolution
from export.elastic.space import bit_operations, byte_count
from export.progress import counted
from export.targets import TARGETS, target_named
from refold.atomic import check_output, write_atomically
from refold.errors import UsageError

__all__ = ["parse_amount", "search"]

UNITS = {
    "bytes": {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20},
    "operations": {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "time": {"ms": 1, "us": 1e-3, "µs": 1e-3, "s": 1e3},
}


def parse_amount(text: str, kind: str) -> float:
    """`60KB`, `40M`, `2ms`, in bytes, operations or milliseconds. Raises UsageError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]*)\s*", text)
    if not found or found[2] not in UNITS[kind] or float(found[1]) <= 0:
        units = ", ".join(u for u in UNITS[kind] if u)
        raise UsageError(f"{text!r} is no amount above 0: a number and one of {units}.")
    return float(found[1]) * UNITS[kind][found[2]]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(list(TARGETS)), default="ort-x86-avx2", show_default=True)
@click.option("--budget", metavar="BYTES", help="As in 60KB: weights packed to their bits, norms, scales.")
@click.option("--bit-operations", metavar="COUNT", help="As in 400M: multiplications times bits times bits, of one picture.")
@click.option("--latency", metavar="TIME", help="As in 2ms: one picture, one thread, measured on this machine.")
@click.option("--name", default="best", show_default=True, help="Under which the result is kept, for --configuration.")
@click.option(
    "--pairs", type=click.IntRange(10), default=200, show_default=True, help="Configurations to measure for the predictor."
)
@click.option("--pictures", type=click.IntRange(10), default=500, show_default=True, help="Held-out pictures to measure on.")
@click.option("--population", type=click.IntRange(8), default=100, show_default=True)
@click.option("--generations", type=click.IntRange(0), default=100, show_default=True)
@click.option("--finalists", type=click.IntRange(1), default=8, show_default=True, help="Of the search, to measure at the end.")
@click.option("--data", type=click.Path(path_type=Path), help="The training's pictures, if they lie elsewhere now.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def search(
    run: Path, target: str, budget: str | None, bit_operations: str | None, latency: str | None, name: str, pairs: int,
    pictures: int, population: int, generations: int, finalists: int, data: Path | None, seed: int, threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Find the configuration of RUN with the best accuracy within the budgets.

    Pairs of configuration and accuracy are measured, a predictor learns from them, a genetic search asks the predictor, and the
    finalists are measured. Pairs are kept: a second search of the same run, target and pictures starts from them.
    """
    torch.set_num_threads(threads)
    started, console = time.monotonic(), Console(stderr=True, quiet=as_json)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise UsageError(f"--name {name!r}: letters, digits, - _ and . only.")
    asked = [
        parse_amount(text, kind) if text else None
        for text, kind in ((budget, "bytes"), (bit_operations, "operations"), (latency, "time"))
    ]
    if not any(asked):
        raise UsageError("Give at least one of --budget, --bit-operations and --latency.")
    folder, evolution = RunFolder(run), Evolution(population, generations, seed=seed)
    console.print("opening the run", highlight=False)
    qmax = target_named(target).qmax
    shop = Workshop.open(folder, data, qmax, pictures)
    check_output(run / f"search-{name}.json")
    times = _latencies(shop, target, console) if asked[2] else None
    budgets = _budgets(shop, asked, times)
    pairs_file = run / f"pairs-{folder.digest()[:12]}-{qmax}-{len(shop.judge.held)}.jsonl"
    with Progress(*counted(), console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
        task: TaskID = bar.add_task("search", total=None)
        choice = choose(
            shop.judge, budgets, pairs_file, pairs=pairs, finalists=finalists, evolution=evolution,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )  # fmt: skip
    folder.keep(name, choice.best.configuration)
    told = _told(choice, budgets, times, name, time.monotonic() - started)
    write_atomically(run / f"search-{name}.json", [json.dumps(told, indent=1).encode() + b"\n"])
    _plots(run, name, shop, choice, budgets)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        _show(choice, budgets, times, run, name)


def _latencies(shop: Workshop, target: str, console: Console) -> Latencies:
    console.print("measuring the latency of every layer", highlight=False)
    space, layout = shop.judge.supernet.space, shop.judge.supernet.layout
    widest = space.uniform(layout, space.weight_bits[-1], space.activation_bits[-1])
    return measure_latency(
        shop.run.program(), given_of(shop.judge.freeze(widest)), target, shop.settings.preprocess, shop.pictures(8)
    )  # fmt: skip


def _budgets(shop: Workshop, asked: list[float | None], times: Latencies | None) -> list[Budget]:
    layout, found = shop.judge.supernet.layout, []
    if asked[0]:
        found.append(Budget("bytes", lambda c: byte_count(layout, c), asked[0], lambda v: f"{v:,.0f} bytes"))
    if asked[1]:
        found.append(Budget("bit operations", lambda c: bit_operations(layout, c), asked[1], lambda v: f"{v / 1e6:,.2f}M"))
    if asked[2] and times is not None:
        total = times.total
        found.append(Budget("latency", lambda c: total, asked[2], lambda v: f"{v:.3f} ms"))
    return found


def _told(choice: Choice, budgets: list[Budget], times: Latencies | None, name: str, seconds: float) -> dict[str, object]:
    def row(c: Candidate) -> dict[str, object]:
        costs = {b.name: cost for b, cost in zip(budgets, c.costs, strict=True)}
        return {"configuration": c.name, "accuracy": c.accuracy, "predicted": c.predicted, **costs}

    quality = {k: v for k, v in asdict(choice.quality).items() if k in ("pairs", "pearson", "kendall", "spearman")}
    found: dict[str, object] = {
        "name": name, "best": row(choice.best), "budgets": {b.name: b.most for b in budgets},
        "finalists": [row(c) for c in choice.finalists], "uniform": [row(c) for c in choice.uniform],
        "pairs": len(choice.pairs), "predictor": quality, "seconds": round(seconds, 1),
    }  # fmt: skip
    if times is not None:
        found["latency"] = {**asdict(times), "total": times.total, "note": SAME_FOR_ALL}
    return found


def _plots(run: Path, name: str, shop: Workshop, choice: Choice, budgets: list[Budget]) -> None:
    space, layout, first = shop.judge.supernet.space, shop.judge.supernet.layout, budgets[0]
    pairs = [(first.cost(g.configuration(space, layout)), y) for g, y in choice.pairs.items()]
    groups = {
        "measured for the predictor": pairs,
        "uniform": [(c.costs[0], c.accuracy) for c in choice.uniform],
        "searched": [(c.costs[0], c.accuracy) for c in choice.finalists],
    }
    pareto(run / f"search-{name}.png", first.name, {k: v for k, v in groups.items() if v}, first.most)
    q = choice.quality
    if q.predicted:
        title = f"{q.pairs} held-out pairs: Pearson {q.pearson:.2f}, Spearman {q.spearman:.2f}, Kendall {q.kendall:.2f}"
        predicted_against_measured(run / f"predictor-{name}.png", q.predicted, q.measured, title)


def _show(choice: Choice, budgets: list[Budget], times: Latencies | None, run: Path, name: str) -> None:
    console = Console()
    if times is not None:
        table = Table(title=f"latency of one picture, {times.total:.3f} ms in all", title_justify="left")
        table.add_column("layer")
        table.add_column("ms", justify="right")
        for layer, ms in times.layers.items():
            table.add_row(layer, f"{ms:.4f}")
        table.add_row("all else", f"{times.other:.4f}")
        console.print(table)
        console.print(SAME_FOR_ALL, highlight=False)
    table = Table(title="; ".join(f"{b.name} within {b.told(b.most)}" for b in budgets), title_justify="left")
    for column in ("configuration", "accuracy", "predicted", *(b.name for b in budgets)):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for c in sorted((*choice.finalists, *choice.uniform), key=lambda c: -c.accuracy):
        costs = (b.told(cost) for b, cost in zip(budgets, c.costs, strict=True))
        mark = " *" if c is choice.best else ""
        table.add_row(f"{c.name}{mark}", f"{c.accuracy:.1%}", f"{c.predicted:.1%}", *costs)
    console.print(table)
    q = choice.quality
    console.print(
        f"predictor on {q.pairs} pairs it never saw: Pearson {q.pearson:.2f}, Spearman {q.spearman:.2f}, "
        f"Kendall {q.kendall:.2f} ({len(choice.pairs)} pairs)",
        highlight=False,
    )
    console.print(f"kept: refold export --from {run} --configuration {name} -o {name}.refold", highlight=False)
