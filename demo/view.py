"""What the person at the terminal sees: a live picture on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.report import Arrival, Traffic
from demo.tally import WINDOW, Tally

__all__ = ["LiveView", "PlainView", "Scene", "View", "make_view", "sparkline"]

BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"clean": "green", "fog": "bright_black", "noise": "yellow"}


@dataclass
class Scene:
    """All a view may show while frames flow."""

    tally: Tally
    traffic: Traffic
    arrivals: list[Arrival] = field(default_factory=list)
    serving_version: int = 0
    serving_domain: str = ""
    note: str = ""


class View(Protocol):
    """Context manager; `step` and `done` frame the preparation, `show` is called a few times a second while frames flow."""

    def __enter__(self) -> View: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def step(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def show(self, scene: Scene) -> None: ...


def make_view(live: bool) -> View:
    """A live view where `live` and stderr is a terminal; lines otherwise. Both write to stderr: stdout is the result's."""
    console = Console(stderr=True)
    return LiveView(console) if live and console.is_terminal else PlainView(console)


def sparkline(values: Sequence[float], width: int, low: float = 0.0, high: float = 100.0) -> str:
    """The last `width` values as blocks of growing height; a NaN is a gap."""
    cells = []
    for value in list(values)[-width:]:
        if value != value:
            cells.append(" ")
            continue
        share = (min(max(value, low), high) - low) / (high - low)
        cells.append(BARS[min(int(share * len(BARS)), len(BARS) - 1)])
    return "".join(cells)


class PlainView:
    """One line per step, then one every few seconds and one for every release."""

    def __init__(self, console: Console, every: float = 5.0) -> None:
        self._console = console
        self._every = every
        self._last = 0.0
        self._told = 0

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def step(self, text: str) -> None:
        self._line(f"• {text}")

    def say(self, text: str) -> None:
        self._line(f"  {text}")

    def show(self, scene: Scene) -> None:
        for arrival in scene.arrivals[self._told :]:
            self._line(f"  release {arrival.version} for {arrival.domain or 'd0'} applied at frame {arrival.frame:,}")
        self._told = len(scene.arrivals)
        if time.monotonic() - self._last < self._every or scene.tally.last < 0:
            return
        self._last = time.monotonic()
        adapted, frozen = scene.tally.recent()
        phase = scene.tally.plan.phase_of(scene.tally.last)
        self._line(
            f"  frame {scene.tally.last + 1:5,}  {phase.name:9}  adapted {adapted:5.1f} %  frozen {frozen:5.1f} %  "
            f"entropy {scene.tally.recent_entropy():.2f}  sent {scene.traffic.samples:4,} pictures  "
            f"up {_size(scene.traffic.bytes_up)}  down {_size(scene.traffic.bytes_down)}  "
            f"release {scene.serving_version} {scene.serving_domain}"
        )

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """A panel that redraws itself in place; finished steps scroll away above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=False)
        self._began = time.monotonic()
        self._status = console.status("")
        self._flowing = False

    def __enter__(self) -> LiveView:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._status.stop()
        if self._flowing:
            self._live.stop()

    def step(self, text: str) -> None:
        self._console.print(Text.assemble((f"{time.monotonic() - self._began:6.1f} s  ", "dim"), text))
        self._status.update(text)

    def say(self, text: str) -> None:
        self._console.print(Text(f"          {text}", style="dim"))

    def show(self, scene: Scene) -> None:
        if not self._flowing:
            self._status.stop()
            self._live.start()
            self._flowing = True
        self._live.update(self._picture(scene))

    def _picture(self, scene: Scene) -> Panel:
        tally, traffic = scene.tally, scene.traffic
        adapted, frozen = tally.recent()
        width = max(20, self._console.width - 40)
        history = tally.series(max(1, tally.plan.frames // width))
        lines = Table.grid(padding=(0, 2))
        lines.add_row("adapted", _percent(adapted, "bold blue"), Text(sparkline(history["adapted"], width, 10), style="blue"))
        lines.add_row("frozen", _percent(frozen, "yellow"), Text(sparkline(history["frozen"], width, 10), style="yellow"))
        lines.add_row(
            "entropy", f"{tally.recent_entropy():.2f} nats", Text(sparkline(history["entropy"], width, 0, 1.5), style="magenta")
        )
        facts = Table.grid(padding=(0, 3))
        share = 100 * traffic.samples / max(tally.last + 1, 1)
        facts.add_row(
            f"sent {traffic.samples:,} pictures ({share:.1f} %)",
            f"up {_size(traffic.bytes_up)}",
            f"down {_size(traffic.bytes_down)}",
            f"serving release {scene.serving_version}, domain {scene.serving_domain or 'd0'}",
        )
        releases = ", ".join(f"v{a.version} {a.domain} @{a.frame:,}" for a in scene.arrivals[-6:]) or "none yet"
        rows: list[RenderableType] = [
            self._phases(tally),
            Text(""),
            lines,
            Text(""),
            facts,
            Text(f"releases: {releases}", style="bright_magenta"),
        ]
        if scene.note:
            rows.append(Text(scene.note, style="dim"))
        title = f"frame {tally.last + 1:,} of {tally.plan.frames:,} · accuracy of the last {WINDOW}"
        return Panel(Group(*rows), title=title, border_style="cyan")

    def _phases(self, tally: Tally) -> Text:
        width = max(20, self._console.width - 8)
        out = Text()
        for phase in tally.plan.phases:
            cells = max(1, round(width * phase.frames / tally.plan.frames))
            done = min(cells, max(0, round(cells * (tally.last + 1 - phase.first) / phase.frames)))
            name = f" {phase.name} "[:cells].ljust(cells)
            out.append(name[:done], style=f"reverse {COLOURS[phase.weather]}")
            out.append(name[done:], style=f"dim {COLOURS[phase.weather]}")
        return out


def _percent(value: float, style: str) -> Text:
    return Text("  –" if value != value else f"{value:5.1f} %", style=style)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
