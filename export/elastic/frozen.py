"""One configuration as integers: codes, scales, and the norm statistics that belong to them.

Every configuration shifts the statistics of every layer, so they are measured again for each (EQ-Net's batch norm calibration),
in train mode, before it is judged or shipped. The moments are pooled over all batches, not averaged with a momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.elastic.space import Configuration
from export.elastic.supernet import Supernet, batch_statistics
from export.interpret import run, simulated
from export.ir import Graph, Node
from export.quantise import WeightCodes, dequantised_parameters, quantise_weights
from export.scales import Scale

__all__ = ["Frozen", "Moments", "freeze"]

F32 = NDArray[np.float32]


class Moments:
    """Pooled mean and variance of every batch norm's input; stands where the norm is computed."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, Tensor, Tensor, str]] = {}

    def __call__(self, node: Node, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        axes = [i for i in range(x.dim()) if i != 1]
        count, mean_name = x.numel() // x.shape[1], node.parameters["mean"]
        y = x.double()
        total, square = y.sum(axes), (y * y).sum(axes)
        if mean_name in self._held:
            n, s, q, _ = self._held[mean_name]
            count, total, square = n + count, s + total, q + square
        self._held[mean_name] = (count, total, square, node.parameters["variance"])
        return batch_statistics(node, x, p)

    def constants(self) -> dict[str, F32]:
        """Means and (unbiased) variances by the names of the graph's constants."""
        found: dict[str, F32] = {}
        for mean_name, (n, total, square, variance_name) in self._held.items():
            mean = total / n
            variance = ((square / n - mean * mean) * (n / max(n - 1, 1))).clamp_min(0)
            found[mean_name] = mean.float().numpy()
            found[variance_name] = variance.float().numpy()
        return found


@dataclass(frozen=True)
class Frozen:
    """A configuration that computes what an integer engine computes.

    Attributes:
        graph: after the rules, its constants those of the supernet with this configuration's norm statistics.
        weights: by layer output; scales: by scaled value.
    """

    configuration: Configuration
    graph: Graph
    weights: Mapping[str, WeightCodes]
    scales: Mapping[str, Scale]

    def logits(self, x: Iterable[Tensor]) -> F32:
        """float32 (N, classes) of batches float32 (n, 3, H, W)."""
        parameters, at = dequantised_parameters(self.graph, self.weights), simulated(self.scales)
        with torch.no_grad():
            return np.concatenate([run(self.graph, batch, parameters, at).numpy() for batch in x])

    def constants(self) -> Mapping[str, F32]:
        return self.graph.constants


def freeze(supernet: Supernet, configuration: Configuration, x: Iterable[Tensor], qmax: int = 127) -> Frozen:
    """Args:
        x: batches of training inputs, at least two pictures each, for the norm statistics; about 256 pictures do.
        qmax: largest weight code of the target. A layer whose codes go beyond (8 bits on a target of 64, and 7 bits when a zero
            point pushes them out) is rounded anew from the same float weights, per channel and symmetric, to fit.

    Raises:
        UsageError: the configuration is not one of the supernet's.
    """  # fmt: skip
    supernet.space.check(supernet.layout, configuration)
    graph = supernet.graph.copy()
    graph.constants = {name: np.array(t.detach().numpy()) for name, t in supernet.constants.items()}
    weights = {}
    for place in supernet.layout.layers:
        form = configuration.weight[place.name]
        codes, steps = supernet.weight_codes(place.name, form)
        found = WeightCodes(codes.numpy(), steps.numpy(), form.bits)
        if int(np.abs(found.codes.astype(np.int16)).max()) > qmax:
            weight = supernet.weight_of(place.name).detach().numpy()
            found = quantise_weights(weight, form.bits, qmax)
        weights[place.output] = found
    scales = {}
    for name, chosen in configuration.activations:
        step, zero, levels = supernet.values[name].scale(chosen)
        scales[name] = Scale(step, zero, levels)
    moments = Moments()
    parameters, at = dequantised_parameters(graph, weights), simulated(scales)
    with torch.no_grad():
        for batch in x:
            run(graph, batch, parameters, at, moments)
    graph.constants.update(moments.constants())
    return Frozen(configuration, graph, weights, scales)
