"""How statistics are measured on this machine: by the bundle's graph, else by its tap engine, else not at all."""

from __future__ import annotations

from collections.abc import Callable

from edge.engine import EngineFactory
from edge.statistics.estimate import Measure
from edge.statistics.graph import StatisticsGraph
from edge.statistics.iterated import IteratedTaps
from refold.statistics import StatisticsModel

__all__ = ["measure_of"]


def measure_of(
    factory: EngineFactory, model: StatisticsModel, memory_mb: int, stopped: Callable[[], bool] = lambda: False
) -> Measure | None:
    """The way to measure, or None where the bundle offers none: then nothing adapts here but by releases.

    Args:
        memory_mb: MiB a run may take.
        stopped: asked in between; True ends a measurement with InterruptedError.
    """
    bundle, layout = factory.bundle, model.layout
    if not layout.sites:
        return None
    if StatisticsGraph.available(bundle):
        return StatisticsGraph(bundle, layout, memory=memory_mb * 2**20, threads=factory.threads, stopped=stopped)
    if factory.has_taps:
        return IteratedTaps(layout, factory.build_taps, factory.build, bundle.preprocess, stopped)
    return None
