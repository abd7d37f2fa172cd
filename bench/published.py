"""`python -m bench.published [--check]`: the published results as tables in docs/benchmarks.md.

A table stands between two comments, `<!-- published NAME -->` and `<!-- end -->`, and is made from the published NAME.json
alone: claims, rows, machine, commit. Nobody types a published number. `--check` writes nothing and exits 1 where the page
differs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.result import Cell
from refold.atomic import write_atomically
from refold.errors import InputError, RefoldError

__all__ = ["TABLES", "Table", "filled", "formatted", "main"]

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "bench" / "results" / "published"
BLOCK = re.compile(r"(<!-- published (?P<name>[\w-]+) -->\n)(?P<content>.*?)(<!-- end -->)", re.DOTALL)
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """How one result is shown. columns: of its rows, separated by semicolons; those that the JSON lacks are left out. keep:
    which rows."""

    columns: str
    keep: Callable[[Row], bool] = lambda row: True


EXACT = "net; states; identical; release B; release %; swap ms; int8 ms; fp32 ms; int8 ÷ fp32"
TABLES: dict[str, Table] = {
    "adaptation": Table("protocol; row; precision; mean; last quarter; clean; uploaded %; up B/frame; down B/frame"),
    "corrections": Table(
        "order; images; uncorrected; lame always; lame switched; t3a always; t3a switched; adanpc always; adanpc switched; "
        "on %; second look; compute; marked %"
    ),
    "elastic": Table("configuration; accuracy %; alone %; ORT static %; kB; bit operations M"),
    "exactness": Table(EXACT),
    "exactness-vnni": Table(EXACT),
    "experts": Table(
        "engine; cap %; bits; tokens/s; hit; hit / belady; MB/token; stall ms; time / compute; promise; OOM",
        lambda row: bool(row.get("tokens/s")),
    ),
    "experts-long": Table("engine; tokens; tokens/s; hit; kB/minute; resident kB/minute; files grown; OOM"),
    "field": Table("network; stream; frames; frozen; adapted; difference; worst 500; last quarter; shifts; swaps"),
    "fixedpoint": Table(
        "row; rate; accuracy %; bits; zeros %; size ratio; modelled training; modelled inference; integer layers; engine %; "
        "7-bit engine %; shifted engine %; measured inference"
    ),
    "forge": Table("network; kind; corruption; frozen; adapted; last quarter; converged at; swaps"),
    "overhead": Table(
        "net; side; bare ms; daemon ms; ratio; block ratio; cpu ratio; p99 ratio; measurement s; p99 measuring ratio; "
        "frames lost; bare MB; daemon MB; measured MB",
    ),
    "targets": Table(
        "net; target; accuracy; float; same class; steps apart; ms; model B; swap ms; identical; export s; peak MB",
    ),
}


def formatted(value: Cell) -> str:
    """A cell: four significant digits, thousands with commas; "" for what was not measured."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value:
            return "not measured"
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return value.replace("|", "\\|")


def table(name: str, result: Mapping[str, Any]) -> str:
    """Markdown of one result: where it was measured, its claims, its rows."""
    shown, machine = TABLES[name], result["machine"]
    instructions = ", ".join(machine["instructions"]) or "no vector instructions of note"
    where = (
        f"`{name}.json`: commit {result['commit']}, {result['date'][:10]}, {machine['processor']} ({machine['cores']} cores, "
        f"{instructions}), {result['seconds']:,.0f} s."
    )
    claims = result["claims"]
    held = sum(bool(c["holds"]) for c in claims)
    lines = [where + f" {held} of {len(claims)} claims hold.", "", "| claim | value | bar | |", "|---|---|---|---|"]
    for c in claims:
        verdict = "holds" if c["holds"] else "**does not hold**"
        lines.append(
            f"| {formatted(c['text'])} | {formatted(c['value'])}{c['unit']} | {c['sense']} {formatted(c['bar'])} | {verdict} |"
        )
    rows = [r for r in result["rows"] if shown.keep(r)]
    columns = [c for c in shown.columns.split("; ") if any(r.get(c) not in (None, "") for r in rows)]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(formatted(r.get(c)) for c in columns) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every block made anew.

    Raises:
        InputError: a block names a result that is not there or not known.
    """

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        path = results / f"{name}.json"
        if name not in TABLES or not path.is_file():
            raise InputError(f"docs/benchmarks.md shows {name}, but there is no published result {path}.", code="no-result")
        return f"{found[1]}{table(name, json.loads(path.read_text(encoding='utf-8')))}{found[4]}"

    return BLOCK.sub(block, page)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where the page differs from the JSON.")
def main(check: bool) -> None:
    """Writes the published results into docs/benchmarks.md."""
    try:
        before = PAGE.read_text(encoding="utf-8")
        after = filled(before)
        if check and after != before:
            click.echo("docs/benchmarks.md differs from bench/results/published: run python -m bench.published.", err=True)
            sys.exit(1)
        if after != before:
            write_atomically(PAGE, [after.encode()])
    except RefoldError as e:
        click.echo(e.message, err=True)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
