"""`python -m bench.strength learn NETWORK`, then `python -m bench.strength judge NETWORK`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from bench.field.networks import NETWORKS
from bench.result import console
from bench.strength.judge import CORRUPTIONS, ORDERS, accuracies, stream
from bench.strength.learn import by_group, calibration_domains
from bench.strength.served import Served
from refold.atomic import write_atomically
from refold.errors import UsageError

__all__ = ["main"]

CIFAR = [n for n, network in NETWORKS.items() if not network.photographs]
RESULTS = Path(__file__).resolve().parents[1] / "results"
folder = click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder for results.")


@click.group()
def main() -> None:
    """Strengths of the norm sites, learnt without labels, against 1 everywhere."""


@main.command()
@click.argument("network", type=click.Choice(CIFAR))
@click.option("--groups", type=click.IntRange(1), help="Groups of neighbouring sites; default: one a site, at most 21.")
@folder
def learn(network: str, groups: int | None, out: Path) -> None:
    """Learns a network's strengths."""
    served = Served(network)
    domains = calibration_domains(served)
    groups = groups or (served.sites if served.sites <= 21 else 18)
    found = by_group(served, domains, groups, lambda line: console.print(line, highlight=False))
    _write(_path(out, network), {"strength": found.tolist()})


@main.command()
@click.argument("network", type=click.Choice(CIFAR))
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Streams of each kind, from seed 201.")
@click.option("--order", "orders", type=click.Choice(list(ORDERS)), multiple=True, help="Default: all.")
@click.option("--scalars", is_flag=True, help="Also one strength for each domain, chosen by its kept images.")
@folder
def judge(network: str, seeds: int, orders: tuple[str, ...], scalars: bool, out: Path) -> None:
    """Compares the strengths learnt with 1 everywhere on the development corruptions."""
    path = _path(out, network)
    if not path.is_file():
        raise UsageError(f"{path} is not there: run `python -m bench.strength learn {network}` first.")
    learnt = np.array(json.loads(path.read_text())["strength"])
    served, tried = Served(network), (0.4, 0.6, 0.8, 1.0) if scalars else (1.0,)
    rows: list[dict[str, object]] = []
    for seed in range(201, 201 + seeds):
        for order in orders or tuple(ORDERS):
            for corruption in CORRUPTIONS:
                row = accuracies(served, *stream(network, corruption, order, seed), {"learnt": learnt}, tried)
                rows.append({"corruption": corruption, "order": order, "seed": seed, **row})
                console.print(f"{seed} {order} {corruption}: {row}", highlight=False)
    _write(path.with_name(path.stem + "-judged.json"), {"rows": rows})


def _path(out: Path, network: str) -> Path:
    return out / f"strength-{network}.json"


def _write(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [(json.dumps(content, indent=1) + "\n").encode()])


if __name__ == "__main__":
    main()
