"""Bias correction (Nagel et al. 2019, §4.2, the empirical form), in the place where it costs nothing: the running mean.

Rounding shifts every channel by the mean of its error, and a shift is what the network notices most. Float and integer network
run side by side; at each layer the mean difference d of its outputs is taken out before the next layer is looked at, in the
channels whose error *behind the activation function* that lessens (behind a ReLU that is mostly closed it often does not):

    mean + d·σ/γ    where a norm is folded behind the layer: β + (c − mean)·γ/σ moves by −d
    bias − d        where there is none
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.interpret import float_parameters, simulated
from export.ir import Graph, Node
from export.operators import evaluate
from export.placement import Placement, is_integer_layer
from export.quantise import WeightCodes, dequantised_parameters
from export.scales import Scale

__all__ = ["PICTURES", "correct_bias"]

F32 = NDArray[np.float32]
PICTURES = 64  # all are held at once, twice; a mean over a feature map needs no more
DEAD = 1e-3  # |γ/σ| against the layer's largest, below which a channel has nothing to correct


def correct_bias(
    graph: Graph, placement: Placement, weights: Mapping[str, WeightCodes], scales: Mapping[str, Scale], x: F32
) -> dict[str, F32]:
    """The constants that change, by name: running means, and biases of layers without a norm.

    Args:
        graph: after the rules.
        weights: the rounded weights.
        scales: of the activations.
        x: calibration inputs, float32 (N, 3, H, W); at most `PICTURES` are used.
    """
    truth, rounded = float_parameters(graph), dequantised_parameters(graph, weights)
    at, changed = simulated(scales), dict[str, F32]()
    batch = torch.from_numpy(x[np.linspace(0, len(x) - 1, min(len(x), PICTURES)).astype(int)])
    ours, theirs = {graph.input: at(graph.input, batch)}, {graph.input: batch}
    with torch.no_grad():
        for node in graph.nodes:
            sees, saw = [ours[i] for i in node.inputs], [theirs[i] for i in node.inputs]
            parameters = dict(rounded(node))
            if is_integer_layer(placement, node) and _corrects(node):
                y, wanted = evaluate(_bare(node), sees, parameters), evaluate(_bare(node), saw, truth(node))
                role, value = _corrected(node, parameters, _shift(node, y, wanted))
                changed[node.parameters[role]] = value.numpy()
                parameters[role] = value
            ours[node.output] = at(node.output, evaluate(node, sees, parameters))
            theirs[node.output] = evaluate(node, saw, truth(node))
            _forget(graph, node, ours, theirs)
    return changed


def _corrects(node: Node) -> bool:
    return "gamma" in node.parameters or "bias" in node.parameters


def _bare(node: Node) -> Node:
    """The layer without the activation function it absorbed."""
    return replace(node, attributes={k: v for k, v in node.attributes.items() if k != "activation"})


def _shift(node: Node, y: Tensor, wanted: Tensor) -> Tensor:
    """(channels,): mean of y − wanted, 0 where taking it out would not lessen the squared error of the activation."""
    y, wanted = _rows(y), _rows(wanted)
    d = (y - wanted).double().mean(0)
    low, high = node.activation or (-math.inf, math.inf)
    true = wanted.clamp(low, high)
    before = (y.clamp(low, high) - true).double().square().sum(0)
    after = ((y - d.float()).clamp(low, high) - true).double().square().sum(0)
    return torch.where(after < before, d, 0.0)


def _rows(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]) if y.dim() == 4 else y.reshape(-1, y.shape[-1])


def _corrected(node: Node, p: Mapping[str, Tensor], d: Tensor) -> tuple[str, Tensor]:
    """(role, its new value) that take the mean difference d, (channels,), out of the layer's output."""
    if "gamma" not in p:
        return "bias", (p["bias"].double() - d).float()
    a = p["gamma"].double() / (p["variance"].double() + float(node.attributes["epsilon"])).sqrt()
    live = a.abs() > DEAD * a.abs().max()
    return "mean", (p["mean"].double() + torch.where(live, d / torch.where(live, a, 1.0), 0.0)).float()


def _forget(graph: Graph, node: Node, *held: dict[str, Tensor]) -> None:
    """Drops values that no later node reads."""
    later = graph.nodes[graph.nodes.index(node) + 1 :]
    wanted = {v for n in later for v in n.inputs}
    for values in held:
        for value in [v for v in values if v not in wanted]:
            del values[value]
