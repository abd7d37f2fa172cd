"""One elastic supernet of ResNet-20 on CIFAR-10, from trained weights, at every bit-width.

Uniform configurations and three searched ones, against the same net at the same bits trained alone for as many steps, and
against ONNX Runtime's own static quantisation at 8 bits. Learned from the first 500 pictures of each class of the train set
(train5k); searched on the test pictures 0 to 1,999; every accuracy is of test pictures from 2,000 on, which nothing has seen.

ONNX Runtime has no static quantisation below 8 bits for convolutions: those cells stay empty.

    setting.py   pictures, sizes of a run        work.py     one training, one search, one measurement: each a process
    ort.py       ONNX Runtime's own              report.py   claims and picture
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, as_completed

from bench.elastic.report import claims, plot
from bench.elastic.setting import SEARCHED, UNIFORM, Scale
from bench.elastic.work import ELASTIC, alone_name, measure, measure_pairs, search_one, train_one
from bench.parallel import executor
from bench.result import Cell, Options, Result, progress
from refold.errors import UsageError

__all__ = ["claims", "plot", "run"]


def run(options: Options) -> Result:
    """Full: 160 steps. Quick: 8, which show that it works and nothing more. `--steps` changes either; `--resume` goes on."""
    scale, work = Scale.of(options), options.target.with_suffix(".work")
    if not options.resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    uniform = [(w, a) for w, a in UNIFORM if options.wants(f"w{w}a{a}")]
    searched = tuple((w, a) for w, a in SEARCHED if options.wants(f"searched w{w}a{a}"))
    alone = [(w, a) for w, a in uniform if (w, a) in scale.alone]
    if not uniform and not searched:
        raise UsageError(f"No configuration is called like {', '.join(options.only)}.")
    names = [ELASTIC, *(alone_name(w, a) for w, a in alone)]
    with progress() as bar, executor(options.processes) as pool:
        task = bar.add_task("training", total=len(names))
        started = time.monotonic()
        seconds: dict[str, float] = {}
        trained = {pool.submit(train_one, name, scale, work): name for name in names}
        for future in as_completed(trained):
            seconds[trained[future]] = round(future.result(), 1)
            bar.update(task, advance=1, description=f"trained {trained[future]}")
        rows_of = ["float", *(f"w{w}a{a}" for w, a in uniform), *(alone_name(w, a) for w, a in alone)]
        task = bar.add_task("measuring", total=len(rows_of) + 2 * len(searched))
        pairs = pool.submit(measure_pairs, scale, work) if searched else None
        measured = {name: pool.submit(measure, name, scale, work) for name in rows_of}
        for _ in as_completed(measured.values()):
            bar.update(task, advance=1)
        quality: dict[str, object] = {}
        if pairs is not None:
            pairs.result()
            bar.update(task, description="searching")
            searches = {key: pool.submit(search_one, *key, scale, work) for key in searched}
            for (w, a), search in searches.items():
                quality, name = search.result().quality, f"searched w{w}a{a}"
                bar.update(task, advance=1)
                measured[name] = pool.submit(measure, name, scale, work, search.result().found)
        rows = _rows(measured)
        bar.update(task, completed=len(rows_of) + 2 * len(searched), description="done")
    shutil.rmtree(work, ignore_errors=True)
    settings: dict[str, object] = {
        "data": "CIFAR-10: train5k learns, test 0-1999 searches, test 2000-9999 reports",
        "net": "ResNet-20 from resnet20_cifar10.npz", "steps": scale.training.steps, "batch": scale.training.batch,
        "training seconds": seconds, "seconds in all": round(time.monotonic() - started, 1), "processes": options.processes,
        "pairs": scale.pairs, "report pictures": scale.report, "seed": options.seed, **quality,
    }  # fmt: skip
    columns = ["configuration", "accuracy %", "alone %", "ORT static %", "kB", "bit operations M", "equal to"]
    return Result("elastic", rows, claims(rows, settings), columns, settings, options.quick)


def _rows(measured: dict[str, Future[dict[str, Cell]]]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for name, future in measured.items():
        found = dict(future.result())
        if name.startswith("alone-"):
            continue
        row: dict[str, Cell] = {"configuration": name, **found}
        if name.startswith("searched "):
            row["equal to"] = name.removeprefix("searched ")
        if f"alone-{name}" in measured:
            row["alone %"] = measured[f"alone-{name}"].result()["accuracy %"]
        if name == "w8a8":
            row["ORT static %"] = measured["float"].result()["ORT static %"]
        if name == "float":
            row.pop("ORT static %", None)
        rows.append(row)
    return rows
