"""`refold edge experts`: what a budget will give, from a bundle alone (plan) and from a recorded routing (replay)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refold.errors import UsageError

if TYPE_CHECKING:
    from edge.experts.plan import Plan
    from edge.experts.replay import Outcome

__all__ = ["experts"]

SHARES = (0.125, 0.25, 0.5, 0.75)


@click.group()
def experts() -> None:
    """Plan the paging of a mixture-of-experts model, and replay its routing."""


BUNDLE = click.Path(path_type=Path)


@experts.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--memory", default="auto", show_default=True, help="For experts: a size such as 512MB, or auto.")
@click.option("--disk", help="Reading rate, as in 850MB/s.")
@click.option("--measure-disk", is_flag=True, help="Measure it with the records of the bundle, for two seconds.")
@click.option("--compute-ms", type=float, help="Milliseconds of computing per token when every expert is in memory.")
@click.option("--trace", type=BUNDLE, help="A routing of this model, from `refold edge generate --trace`; else frequencies.")
@click.option("--policy", default="value", show_default=True, help="Cache policy of the replay.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def plan(
    bundle: Path,
    memory: str,
    disk: str | None,
    measure_disk: bool,
    compute_ms: float | None,
    trace: Path | None,
    policy: str,
    as_json: bool,
) -> None:
    """Predict hit rate, bytes and tokens per second of a bundle under a memory and a disk."""
    from edge.experts import plan as planning
    from edge.experts.budget import choose, resolve
    from edge.experts.policies import kept_weights
    from edge.experts.trace import Trace
    from refold.experts.paged import PagedModel

    if (disk is None) == (not measure_disk):
        raise UsageError("Give either --disk, as in 850MB/s, or --measure-disk.")
    model = PagedModel.open(bundle)
    index = model.index
    auto = memory.strip().lower() == "auto"
    budget = resolve("auto", model) if auto else choose(memory).bytes
    if disk is not None:
        rate = planning.parse_rate(disk)
    else:
        with _progress("Measuring the disk", 100) as step:
            done = [0]

            def tell(share: float) -> None:
                step(int(100 * share) - done[0])
                done[0] = int(100 * share)

            rate = planning.measure_disk(bundle, model.records_at, index.total, index.largest, step=tell)
    told = planning.plan(
        index,
        budget,
        rate,
        name=str(bundle),
        compute=None if compute_ms is None else compute_ms / 1000,
        trace=None if trace is None else Trace.load(trace),
        policy=policy,
        weights=kept_weights(bundle),
    )
    if as_json:
        click.echo(json.dumps(asdict(told)))
    else:
        click.echo(_plan_text(told))


def _plan_text(p: Plan) -> str:
    rows = [
        ("memory for experts", f"{_mb(p.budget)} of {_mb(p.total)} ({p.budget / p.total:.1%}); least {_mb(p.floor)}"),
        ("slots", f"{p.slots:.1f} of {p.experts} per layer, {p.layers} layers, top {p.top_k}"),
        ("hit rate", f"{p.hit_rate:.1%} (from the {p.source})" + (f"; optimum {p.belady:.1%}" if p.belady is not None else "")),
        ("bytes per token", f"{_mb(p.bytes_per_token)} of {_mb(p.cold_bytes)} with nothing in memory"),
        ("disk", f"{_mb(p.disk)}/s, so reading takes {p.read_seconds * 1e3:,.1f} ms per token"),
    ]
    if p.compute_seconds is not None and p.fastest is not None and p.slowest is not None:
        rows += [
            ("computing", f"{p.compute_seconds * 1e3:,.1f} ms per token"),
            ("tokens per second", f"{p.slowest:.2f} reading only when asked, {p.fastest:.2f} with perfect read-ahead"),
        ]
        if p.needed_hit_rate is not None:
            rows.append(("computing-bound from", f"a hit rate of {p.needed_hit_rate:.1%}"))
    else:
        rows.append(("tokens per second", f"{1 / p.read_seconds:.2f} at most" if p.read_seconds else "as fast as it computes"))
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


@experts.command()
@click.argument("trace", type=BUNDLE)
@click.option("--bundle", type=BUNDLE, help="The model's: record sizes and frequencies. Without it, all records are equal.")
@click.option("--memory", "memories", multiple=True, help="For experts, as 512MB; repeatable. Default: shares of all.")
@click.option("--policy", "policies", multiple=True, help="Only these; repeatable.")
@click.option("--skip", type=int, help="Tokens that fill the cache and do not count; default: a quarter.")
@click.option("--tune", is_flag=True, help="Tune the weights of `value` on the first half and judge on the second.")
@click.option("--keep", is_flag=True, help="With --tune: leave the weights beside the bundle, where the pager finds them.")
@click.option("--plot", type=BUNDLE, help="Write hit rate over slots as a picture.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def replay(
    trace: Path,
    bundle: Path | None,
    memories: tuple[str, ...],
    policies: tuple[str, ...],
    skip: int | None,
    tune: bool,
    keep: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Hit rates of every cache policy and of Belady's optimum over a recorded routing."""
    import numpy as np

    from edge.experts import replay as replays
    from edge.experts.cache import frequencies, memory_sizes
    from edge.experts.plan import check_trace
    from edge.experts.policies import POLICIES, kept_weights, make_policy, weights_file
    from edge.experts.trace import Trace
    from refold.atomic import write_atomically
    from refold.experts.paged import PagedModel
    from refold.sizes import parse_size

    if keep and not (tune and bundle):
        raise UsageError("--keep needs --tune and --bundle.")
    routing = Trace.load(trace)
    if len(routing) < 2:
        raise UsageError(f"The trace {trace} has {len(routing)} tokens: record a longer one.", code="trace")
    sizes, frequency, weights = np.full(routing.layout.count, 4096, np.int64), None, None
    if bundle is not None:
        index = PagedModel.open(bundle).index
        check_trace(routing, index)
        sizes, frequency, weights = memory_sizes(index), frequencies(index), kept_weights(bundle)
    elif memories:
        raise UsageError("--memory needs --bundle, which knows how large a record is.")
    for name in policies:
        make_policy(name, routing.layout)
    total = int(sizes.sum())
    budgets = sorted({parse_size(m) for m in memories} or {int(total * s) for s in SHARES})
    names = policies or tuple(POLICIES)
    half = len(routing) // 2
    before = min(half if skip is None and tune else len(routing) // 4 if skip is None else skip, len(routing) - 1)
    with _progress("Replaying", (len(names) + 1) * len(budgets) + (42 if tune else 0)) as step:
        if tune:
            middle = budgets[len(budgets) // 2 - (len(budgets) > 1)]
            weights = replays.tune(routing.part(0, half), sizes, middle, frequency=frequency, start=weights, step=step)
        told = [
            replays.compare(routing, sizes, b, frequency=frequency, weights=weights, skip=before, policies=names, step=step)
            for b in budgets
        ]
    slots = [b / float(sizes.mean()) / len(routing.layers) for b in budgets]
    if keep and bundle is not None and weights is not None:
        write_atomically(weights_file(bundle), [json.dumps(asdict(weights)).encode()])
    if plot is not None:
        _plot(plot, slots, told, routing.experts)
    if as_json:
        rows = [_row(s, t) for s, t in zip(slots, told, strict=True)]
        head = {"tokens": len(routing), "skip": before, "weights": asdict(weights) if weights else None}
        click.echo(json.dumps(head | {"budgets": rows}))
        return
    click.echo(_replay_text(slots, total, told))
    if tune and weights is not None:
        click.echo("weights: " + ", ".join(f"{k} {v:g}" for k, v in asdict(weights).items()))


def _row(slots: float, told: dict[str, Outcome]) -> dict[str, Any]:
    return {"slots": slots} | {name: asdict(o) | {"hit_rate": o.hit_rate} for name, o in told.items()}


def _replay_text(slots: list[float], total: int, told: list[dict[str, Outcome]]) -> str:
    from edge.experts.replay import BELADY

    rows = [["slots per layer", *(f"{s:.1f}" for s in slots)]]
    rows.append(["share of all", *(f"{t[BELADY].budget / total:.1%}" for t in told)])
    for name in told[0]:
        cells = []
        for t in told:
            rate, best = t[name].hit_rate, t[BELADY].hit_rate
            cells.append(f"{rate:.1%}" + ("" if name == BELADY or not best else f" ({rate / best:.2f})"))
        rows.append([name, *cells])
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join([*lines, "In brackets: share of the optimum, which knows the future."])


def _plot(path: Path, slots: list[float], told: list[dict[str, Outcome]], count: int) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from refold.errors import StorageError

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in told[0]:
        axes.plot(slots, [t[name].hit_rate for t in told], marker="o", label=name, ls="--" if name == "belady" else "-")
    axes.set(xlabel=f"slots per layer, of {count}", ylabel="hit rate (strict)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as e:
        raise StorageError(f"{path} cannot be written: {e}.") from e
    finally:
        plt.close(figure)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


class _progress:  # noqa: N801 - used as a function
    """A bar on standard error; the step takes how many units are done, one by default."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda n=1: self._bar.advance(self._task, n)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
