"""How much each layer minds few bits: its weights alone are rounded, and the logits are compared with the float model's.

error[b] = rms(logits − float logits) / std(float logits), weights of this layer in b bits, everything else in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from export.interpret import batches, float_parameters, run
from export.ir import Graph, Node
from export.placement import Placement, is_integer_layer
from export.quantise import quantise_weights
from refold.packing import packed_size

__all__ = ["BITS", "LayerSensitivity", "sensitivity"]

F32 = NDArray[np.float32]
BITS = (2, 3, 4, 5, 6, 8)  # 7 takes the room of 8: neither is packed
PICTURES = 32  # layers differ by orders of magnitude; the noise of so few pictures does not


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer's row.

    Attributes:
        name: the layer's, as a person calls it.
        weights: how many it has.
        errors: by bits.
        pinned: first or last layer: it keeps 8 bits unless a person says otherwise.
    """

    name: str
    weights: int
    errors: Mapping[int, float]
    pinned: bool

    def size(self, bits: int) -> int:
        """Bytes in the bundle."""
        return packed_size(self.weights, bits)


def sensitivity(
    graph: Graph,
    placement: Placement,
    x: F32,
    qmax: int,
    bits: Sequence[int] = BITS,
    progress: Callable[[str], None] = lambda what: None,
) -> list[LayerSensitivity]:
    """One row for each integer layer, in execution order.

    Args:
        graph: after the rules.
        x: calibration inputs, float32 (N, 3, H, W); at most 32 are used.
        qmax: the largest code the target's kernels take.
    """
    x = x[np.linspace(0, len(x) - 1, min(len(x), PICTURES)).astype(int)]
    layers = [n for n in graph.nodes if is_integer_layer(placement, n)]
    truth = _logits(graph, x, None, None)
    spread = max(float((truth - truth.mean(0)).std()), 1e-12)
    rows = []
    for i, node in enumerate(layers):
        progress(f"sensitivity of {node.name} ({i + 1} of {len(layers)})")
        weight = graph.constants[node.parameters["weight"]]
        errors = {}
        for b in bits:
            logits = _logits(graph, x, node, torch.from_numpy(quantise_weights(weight, b, qmax).dequantised()))
            errors[b] = float(np.sqrt(np.mean((logits - truth) ** 2))) / spread
        rows.append(LayerSensitivity(node.name, weight.size, errors, node in (layers[0], layers[-1])))
    return rows


def _logits(graph: Graph, x: F32, rounded: Node | None, weight: torch.Tensor | None) -> F32:
    plain = float_parameters(graph)

    def parameters(node: Node) -> Mapping[str, torch.Tensor]:
        found = plain(node)
        return {**found, "weight": weight} if node is rounded and weight is not None else found

    with torch.no_grad():
        return np.concatenate([run(graph, b, parameters).numpy() for b in batches(x)])
