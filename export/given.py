"""What a training hands to the exporter in place of calibration and rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.ir import Graph
from export.quantise import WeightCodes
from export.scales import Scale
from refold.errors import ModelError

__all__ = ["Given", "with_constants"]


@dataclass(frozen=True)
class Given:
    """A trained quantised network, in the words of the captured graph after its rules.

    Attributes:
        weights: by layer output; codes int8 with the zero point already subtracted (q - z), scale float32 (channels,), bits.
        scales: of every value with a scale of its own; codes 0..levels-1.
        constants: float tensors that replace the captured ones by name: trained weights, the norms of this very form.
    """

    weights: Mapping[str, WeightCodes]
    scales: Mapping[str, Scale]
    constants: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def with_constants(graph: Graph, given: Given) -> Graph:
    """The captured graph with the training's float tensors. Raises ModelError where one does not fit."""
    graph = graph.copy()
    for name, value in given.constants.items():
        if name not in graph.constants or graph.constants[name].shape != value.shape:
            raise ModelError(f"The training brings {name}, which does not fit: it belongs to another model.", code="given")
        graph.constants[name] = np.asarray(value, np.float32)
    return graph
