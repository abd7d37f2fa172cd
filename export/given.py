"""What a training hands to the exporter in place of rounding and calibration: integers, scales and norms, all final."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from export.calibrate import Calibration
from export.interpret import batches, run, simulated
from export.ir import Graph
from export.placement import Placement, is_integer_layer
from export.quantise import StoredWeight, WeightCodes, dequantised_parameters
from export.scales import Scale
from refold.errors import ModelError

__all__ = ["Given", "taken", "with_constants"]


@dataclass(frozen=True)
class Given:
    """A trained quantised network, in the words of the captured graph after its rules.

    Attributes:
        weights: codes, scales and bits of every integer layer, by its output.
        scales: of every value with a scale of its own.
        constants: float tensors that replace the captured ones by name: trained weights, the norms of this very form.
        stored: weights of float layers on a 16-bit grid, by constant.
        power_of_two: folded scales are powers of two, now and at every refolding.
    """

    weights: Mapping[str, WeightCodes]
    scales: Mapping[str, Scale]
    constants: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)
    power_of_two: bool = False


def with_constants(graph: Graph, given: Given) -> Graph:
    """The captured graph with the training's float tensors. Raises ModelError where one does not fit."""
    graph = graph.copy()
    for name, value in given.constants.items():
        if name not in graph.constants or graph.constants[name].shape != value.shape:
            raise ModelError(
                f"The training brings {name} of shape {value.shape}, which the captured model lacks: it is of another model.",
                code="given",
            )
        graph.constants[name] = np.asarray(value, np.float32)
    return graph


def taken(given: Given, graph: Graph, placement: Placement, x: NDArray[np.float32], qmax: int) -> Calibration:
    """Checks that a training covers the graph, and runs its own forward pass: what the engines will be compared with.

    Args:
        x: calibration inputs, float32 (N, 3, H, W).
        qmax: the largest code the targets' kernels take.

    Raises:
        ModelError: a layer or value is missing, or codes are too large for a target.
    """
    layers = [n for n in graph.nodes if is_integer_layer(placement, n)]
    for node in layers:
        held = given.weights.get(node.output)
        if held is None or held.codes.shape != graph.constants[node.parameters["weight"]].shape:
            raise ModelError(f"The training has no integers that fit {node.name}: it belongs to another model.", code="given")
        if held.codes.size and int(np.abs(held.codes.astype(np.int16)).max()) > qmax:
            raise ModelError(
                f"The integers of {node.name} reach beyond ±{qmax}, which the chosen targets add up without saturating: "
                "export for targets with 8-bit codes, or choose 7 bits or fewer.",
                code="given",
            )
    missing = [v for v in placement.scaled if v not in given.scales]
    if missing:
        raise ModelError(f"The training has no scale for {missing[0]}: it belongs to another model.", code="given")
    parameters, own = dequantised_parameters(graph, given.weights), simulated(given.scales)
    with torch.no_grad():
        logits = np.concatenate([run(graph, b, parameters, own).numpy() for b in batches(x)])
    return Calibration({v: given.scales[v] for v in placement.scaled}, logits, {"trained": 0.0}, "trained")
