"""Runs the graph in torch: in float to calibrate, with simulated codes to choose scales and as the cloud's student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.ir import Graph, Node
from export.operators import Norm, batch_norm, evaluate
from export.scales import Scale

__all__ = ["BATCH", "FakeQuantise", "batches", "fake_quantise", "float_parameters", "run", "some"]

BATCH = 32
PIXELS = 8 * 224 * 224  # of large pictures eight say as much as a hundred small ones

Parameters = Callable[[Node], Mapping[str, Tensor]]
FakeQuantise = Callable[[str, Tensor], Tensor]


def run(graph: Graph, x: Tensor, parameters: Parameters, at: FakeQuantise | None = None, norm: Norm = batch_norm) -> Tensor:
    """The graph's output for one batch.

    Args:
        x: float32 (N, 3, H, W).
        parameters: of a node, by role.
        at: called with each value's name and tensor; returns the tensor its readers see. None: as computed.
        norm: computes every batch norm (`export.operators.evaluate`).
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
    """x rounded to codes and back; gradients pass where x is inside the range (straight-through estimator)."""
    if x.requires_grad and torch.is_grad_enabled():
        return torch.fake_quantize_per_tensor_affine(x, scale.scale, scale.zero_point, 0, scale.levels - 1)
    # The same numbers without the mask that gradients need: 2.6 times as fast.
    inverse = float(np.float32(1) / np.float32(scale.scale))
    y = (x * inverse).round_().clamp_(-scale.zero_point, scale.levels - 1 - scale.zero_point)
    return y.mul_(scale.scale)


def simulated(scales: Mapping[str, Scale]) -> FakeQuantise:
    """Rounds every value that has a scale."""
    return lambda value, x: fake_quantise(x, scales[value]) if value in scales else x


def batches(x: NDArray[np.float32], size: int = BATCH) -> Iterator[Tensor]:
    """Parts of (N, 3, H, W), channels last in memory: torch's convolutions need no reordering then."""
    for start in range(0, len(x), size):
        yield torch.from_numpy(x[start : start + size]).to(memory_format=torch.channels_last)


def some(x: NDArray[np.float32], most: int) -> NDArray[np.int64]:
    """Which of (N, 3, H, W) stand for all: at most `most`, evenly spread, of large pictures no more than eight."""
    count = min(len(x), most, max(8, PIXELS // (x.shape[2] * x.shape[3])))
    return np.linspace(0, len(x) - 1, count).astype(np.int64)
