"""Statistics of the images a device keeps, forward only: what a norm's input looks like here, and what to serve for it.

graph      runs the bundle's statistics graph on kept images, in chunks that fit a memory limit
iterated   the same for bundles or machines without that graph: the tap engine again and again until its moments stay
choose     which of the two this machine has
estimate   a few rounds of either: the images' class mix, then the statistics expected at it, then again
"""

from __future__ import annotations

from edge.statistics.choose import measure_of
from edge.statistics.estimate import Estimate, Known, Measure, estimate
from edge.statistics.graph import StatisticsGraph
from edge.statistics.iterated import IteratedTaps

__all__ = ["Estimate", "IteratedTaps", "Known", "Measure", "StatisticsGraph", "estimate", "measure_of"]
