"""`python -m bench.tuning fixedpoint|elastic`: settings of the benchmarks, chosen on test images that no benchmark reports.

    fixedpoint    the learning rate of every row, after two epochs instead of six
    elastic       Adam's rate of the supernet, by the mean of the uniform configurations

Both judge on test images 0 to 1,999; `bench fixedpoint` and `bench elastic` report images 2,000 to 9,999. The result is
printed and written as JSON; what is best is put into the benchmark's code by hand, with this command beside it.
"""

from __future__ import annotations

import json
from concurrent.futures import as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from bench.machine import commit, machine
from bench.parallel import executor
from bench.result import console, progress
from refold.atomic import write_atomically

__all__ = ["main"]

FIXED_RATES, FIXED_EPOCHS = (3e-3, 1e-3, 3e-4, 1e-4), 2
ELASTIC_RATES = (2e-4, 1e-4, 5e-5)


def fixed_rate(row: str, rate: float) -> float:
    """Accuracy in % of one row at one rate."""
    from bench.adaptation.rows import weights
    from bench.fixedpoint import CHOOSING, settings_of
    from demo.images import cifar10
    from demo.models import load_npz, resnet20
    from export.capture import capture
    from export.fixed_point.network import Network
    from export.fixed_point.train import Trainer, accuracy
    from export.preprocessing import parse_preprocess

    torch.set_num_threads(1)
    settings = settings_of(row, quick=False, seed=0, rate=rate, epochs=FIXED_EPOCHS)
    network = Network(capture(load_npz(resnet20(), weights("resnet20_cifar10.npz")).eval(), 32, 32), settings)
    trainer = Trainer(network, parse_preprocess("32x32,imagenet"), *cifar10("train5k"))
    trainer.run()
    images, labels = cifar10("test")
    return round(100 * accuracy(network, trainer.preprocess, images[:CHOOSING], labels[:CHOOSING]), 2)


def elastic_rate(row: str, rate: float) -> float:
    """Mean accuracy in % of the uniform configurations of a supernet trained at one rate."""
    from dataclasses import replace

    from bench.elastic.setting import UNIFORM, Pictures, Scale
    from bench.elastic.work import ELASTIC, train_one
    from bench.result import Options
    from export.elastic.folder import RunFolder

    torch.set_num_threads(1)
    scale = Scale.of(Options())
    scale = replace(scale, training=replace(scale.training, lr=rate))
    with TemporaryDirectory() as folder:
        train_one(ELASTIC, scale, Path(folder))
        net, pictures = RunFolder(Path(folder) / ELASTIC).supernet(), Pictures(scale)
        judge = pictures.judge(net, pictures.searching, scale.final)
        found = [judge.accuracy(net.space.uniform(net.layout, w, a)) for w, a in UNIFORM]
    return round(100 * sum(found) / len(found), 2)


@click.command()
@click.argument("name", type=click.Choice(["fixedpoint", "elastic"]))
@click.option("--only", multiple=True, metavar="ROW", help="These rows alone (fixedpoint).")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Default: bench/results/tuning-NAME.json."
)
def main(name: str, only: tuple[str, ...], processes: int, target: Path | None) -> None:
    """Tries every candidate and prints the best of each row."""
    from bench.fixedpoint import RATES

    rows = [r for r in RATES if not only or r in only] if name == "fixedpoint" else ["supernet"]
    rates = FIXED_RATES if name == "fixedpoint" else ELASTIC_RATES
    work = fixed_rate if name == "fixedpoint" else elastic_rate
    found: dict[str, dict[str, float]] = {row: {} for row in rows}
    with progress() as bar, executor(processes) as pool:
        task = bar.add_task(name, total=len(rows) * len(rates))
        running = {pool.submit(work, row, rate): (row, rate) for row in rows for rate in rates}
        for future in as_completed(running):
            row, rate = running[future]
            found[row][f"{rate:g}"] = future.result()
            bar.update(task, advance=1)
            console.print(f"{row:12s} {rate:g}: {future.result():.2f} %", highlight=False)
    best = {row: max(tried, key=lambda r: tried[r]) for row, tried in found.items()}
    target = target or Path(__file__).resolve().parent / "results" / f"tuning-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    told = {"judged on": "test images 0 to 1,999", "commit": commit(), "machine": machine(), "best": best, "tried": found}
    write_atomically(target, [(json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()])
    for row, chosen in best.items():
        console.print(f"{row}: {chosen} ({found[row][chosen]:.2f} %)", highlight=False)


if __name__ == "__main__":
    main()
