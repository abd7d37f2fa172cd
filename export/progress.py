"""The bars of export's commands where steps are counted."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["counted"]


def counted() -> tuple[ProgressColumn, ...]:
    """What runs, how much of it is done, how long it took and how long it will."""
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
