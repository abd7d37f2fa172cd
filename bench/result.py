"""What a benchmark returns: rows, claims with their bars, and where they are written and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from refold.atomic import write_atomically

__all__ = ["Claim", "Options", "Result", "console", "number", "progress", "show", "stage"]

console = Console()
if not console.is_terminal:
    console = Console(width=160)  # a log file has no width of its own, and eighty columns fold every table
Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Options:
    """What the command line asked for. `target` is the JSON file; working files of a run may lie beside it, or in `work`, and
    stay there with `keep`. `minutes`: of the experts benchmark's long run; 0: none."""

    quick: bool = False
    only: tuple[str, ...] = ()
    resume: bool = False
    processes: int = 1
    seed: int = 0
    target: Path = Path("result.json")
    steps: int | None = None
    minutes: float = 0.0
    work: Path | None = None
    keep: bool = False

    def wants(self, row: str) -> bool:
        return not self.only or any(part in row for part in self.only)


@dataclass(frozen=True)
class Claim:
    """One sentence that a number makes true or not.

    Attributes:
        id: stable, for machines.
        text: the sentence.
        value: measured.
        bar: `value` must be at least ("≥") or at most ("≤") this.
        goal: what would be better still; None: nothing.
    """

    id: str
    text: str
    value: float
    sense: Literal["≥", "≤"]
    bar: float
    goal: float | None = None
    unit: str = ""

    @property
    def holds(self) -> bool:
        """NaN holds nothing."""
        return self.value >= self.bar if self.sense == "≥" else self.value <= self.bar

    @property
    def reaches_goal(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.sense == "≥" else self.value <= self.goal


@dataclass
class Result:
    """`rows` are flat: one mapping of column to value each; `columns` are those the terminal shows, in order."""

    bench: str
    rows: list[dict[str, Cell]]
    claims: list[Claim]
    columns: list[str]
    settings: dict[str, object] = field(default_factory=dict)
    quick: bool = False
    machine: dict[str, object] = field(default_factory=dict)
    commit: str = ""
    seconds: float = 0.0
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def encode(self) -> str:
        claims = [{**asdict(c), "holds": c.holds, "reaches_goal": c.reaches_goal} for c in self.claims]
        content = {**asdict(self), "claims": claims}
        order = ["bench", "quick", "date", "seconds", "commit", "machine", "settings", "claims", "columns", "rows"]
        return json.dumps({key: content[key] for key in order}, indent=1, ensure_ascii=False, default=str) + "\n"

    def write(self, path: Path) -> None:
        write_atomically(path, [self.encode().encode()])


def progress() -> Progress:
    """Bars that tell what runs, how much is done and how long it will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def stage(bar: Progress, task: TaskID, name: str) -> Callable[[str], None]:
    """For whatever tells what it is doing: its words go beside the bar."""

    def tell(what: str) -> None:
        bar.update(task, description=f"{name}: {what}")

    return tell


def number(value: Cell) -> float:
    """A cell as a number; NaN where it is none, which no claim survives."""
    return float(value) if isinstance(value, (int, float)) else float("nan")


def show(result: Result) -> None:
    """Rows and claims on the terminal."""
    title = f"{result.bench}{' (quick)' if result.quick else ''}, {result.commit}, {result.seconds:.0f} s"
    console.print(_table(title, result.columns, result.rows))
    console.print(_claims(result.claims))
    failed = [c.id for c in result.claims if not c.holds]
    if failed:
        console.print(f"{len(failed)} of {len(result.claims)} claims do not hold: {', '.join(failed)}", style="bold red")
    else:
        console.print(f"All {len(result.claims)} claims hold.", style="bold green")


def _table(title: str, columns: Iterable[str], rows: Iterable[Mapping[str, Cell]]) -> Table:
    columns = list(columns)
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(c)) for c in columns))
    return table


def _claims(claims: Iterable[Claim]) -> Table:
    table = Table(title="claims", title_justify="left")
    for column in ("claim", "value", "bar", "goal", ""):
        table.add_column(column, justify="left" if column == "claim" else "right")
    for c in claims:
        verdict = "[green]holds[/]" if c.holds else "[bold red]DOES NOT HOLD[/]"
        goal = "" if c.goal is None else f"{c.sense} {_cell(c.goal)}{c.unit}{' ✓' if c.reaches_goal else ''}"
        table.add_row(c.text, f"{_cell(c.value)}{c.unit}", f"{c.sense} {_cell(c.bar)}{c.unit}", goal, verdict)
    return table


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}".replace(",", " ")
    return value
