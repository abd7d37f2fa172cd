"""The statistics part of a bundle: class groups, graph, class moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.engines import session
from export.quantise import IntegerModel
from export.statistics.graph import statistics_graph
from export.statistics.groups import class_groups
from export.statistics.measure import measured_moments
from refold.statistics import INPUTS, ClassMoments, Layout

__all__ = ["GRAPH", "MOMENTS", "Statistics", "build_statistics"]

F32 = NDArray[np.float32]
GRAPH, MOMENTS = "statistics.onnx", "class_moments.npz"
MOST = 1024  # images measured: a hundred of each of ten classes; more take minutes and say little more


@dataclass(frozen=True, eq=False)
class Statistics:
    """Attributes:
    graph: the model's bytes.
    moments: measured on the calibration images.
    session: the opened graph; `input`: name of its images.
    """

    graph: bytes
    moments: ClassMoments
    session: ort.InferenceSession
    input: str

    def parts(self, model: IntegerModel) -> dict[str, bytes]:
        """The bundle's parts, by path."""
        layout = Layout(model.table)
        return {GRAPH: self.graph, MOMENTS: self.moments.to_bytes(layout.row("mean", {}), layout.row("variance", {}))}


def build_statistics(
    model: IntegerModel, x: F32, logits: F32, progress: Callable[[int], None] = lambda done: None
) -> Statistics | None:
    """None where no norm has statistics.

    Args:
        x: calibration images, float32 (N, 3, H, W).
        logits: the float model's answers to them, (N, classes).
        progress: called with 1 after each image.

    Raises:
        GateError: ONNX Runtime refuses the graph.
    """
    groups = class_groups(logits)
    if not Layout(model.table).sites:
        return None
    graph, tensors = statistics_graph(model, groups.shape[1])
    layout = Layout(model.table)
    opened = session(graph, tensors, exact=True)
    image = next(i.name for i in opened.get_inputs() if i.name not in INPUTS)
    return Statistics(graph, measured_moments(opened, layout, groups, x[:MOST], progress), opened, image)
