"""Runs the graph in torch: in float to calibrate, with simulated codes to choose scales and as the cloud's student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.ir import Graph, Node
from export.operators import Norm, evaluate
from export.scales import Scale

__all__ = ["FakeQuantise", "batches", "fake_quantise", "float_parameters", "run"]

Parameters = Callable[[Node], Mapping[str, Tensor]]
FakeQuantise = Callable[[str, Tensor], Tensor]


def run(graph: Graph, x: Tensor, parameters: Parameters, at: FakeQuantise | None = None, norm: Norm | None = None) -> Tensor:
    """The graph's output for one batch.

    Args:
        x: float32 (N, 3, H, W).
        parameters: of a node, by role.
        at: called with each value's name and tensor; returns the tensor its readers see. None: as computed.
        norm: takes the place of every batch norm (see `export.operators.evaluate`). None: the exported statistics.
    """
    values = {graph.input: x if at is None else at(graph.input, x)}
    left = {value: len(readers) for value, readers in graph.consumers().items()}
    for node in graph.nodes:
        y = evaluate(node, [values[i] for i in node.inputs], parameters(node), norm)
        values[node.output] = y if at is None else at(node.output, y)
        for value in set(node.inputs):
            left[value] -= 1
            if not left[value] and value not in (graph.output, graph.input):
                del values[value]
    return values[graph.output]


def float_parameters(graph: Graph) -> Parameters:
    """Every node's own float constants."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in graph.constants.items()}
    return lambda node: {role: tensors[name] for role, name in node.parameters.items()}


def fake_quantise(x: Tensor, scale: Scale) -> Tensor:
    """x rounded to codes 0..255 and back; gradients pass where x is inside the range (straight-through estimator)."""
    return torch.fake_quantize_per_tensor_affine(x, scale.scale, scale.zero_point, 0, 255)


def simulated(scales: Mapping[str, Scale]) -> FakeQuantise:
    """Rounds every value that has a scale."""
    return lambda value, x: fake_quantise(x, scales[value]) if value in scales else x


def batches(x: NDArray[np.float32], size: int = 32) -> Iterator[Tensor]:
    for start in range(0, len(x), size):
        yield torch.from_numpy(x[start : start + size])
