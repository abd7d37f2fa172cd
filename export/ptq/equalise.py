"""Cross-layer equalisation (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", §4.1).

A layer, ReLU and the next layer compute the same when channel i of the first is divided by s[i] and the weights that read it
are multiplied by s[i]. There the ranges are those of two weight matrices. Here weights have a scale for every output channel
already, and what suffers is the activation between them, which has one for all channels: so

    s[i] = sqrt(reach[i] / weight[i])    reach: largest activation of channel i; weight: largest weight that reads it

up to a common factor, which leaves both with the same spread. The division goes into gamma and beta: the first layer's integers
do not change at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.interpret import batches, float_parameters, run
from export.ir import Graph, Node
from export.placement import Placement, is_integer_layer

__all__ = ["equalise"]

F32 = NDArray[np.float32]
MOST = 16.0  # a channel is stretched or shrunk no further: a range is a maximum over few pictures
KEEPS_CHANNELS = ("max_pool", "avg_pool", "global_avg_pool")  # and commutes with a positive factor per channel


def equalise(graph: Graph, placement: Placement, x: F32) -> dict[str, F32]:
    """The constants that change, by name; the float function stays the same up to rounding.

    Args:
        graph: after the rules.
        x: calibration inputs, float32 (N, 3, H, W).
    """
    pairs = [(n, reader) for n in graph.nodes if (reader := _reader(graph, placement, n)) is not None]
    reach = _reach(graph, {n.output for n, _ in pairs}, x)
    changed: dict[str, F32] = {}
    for first, second in pairs:
        weight = changed.get(second.parameters["weight"], graph.constants[second.parameters["weight"]])
        depthwise = _is_depthwise(second)
        read = np.abs(weight).reshape(len(weight), -1).max(1) if depthwise else np.abs(np.swapaxes(weight, 0, 1)).reshape(
            weight.shape[1], -1
        ).max(1)  # fmt: skip
        s = _factors(reach[first.output], read)
        for role in _scaled_roles(first):
            name = first.parameters[role]
            value = changed.get(name, graph.constants[name])
            changed[name] = (value / _along(s, value.ndim, 0)).astype(np.float32)
        changed[second.parameters["weight"]] = (weight * _along(s, weight.ndim, 0 if depthwise else 1)).astype(np.float32)
    return changed


def _factors(reach: F32, read: F32) -> NDArray[np.float64]:
    live = (reach > 0) & (read > 0)
    if not live.any():
        return np.ones(len(reach))
    s = np.sqrt(np.where(live, reach, 1).astype(np.float64) / np.where(live, read, 1))
    s = s / np.exp(np.log(s[live]).mean())
    return np.where(live, np.clip(s, 1 / MOST, MOST), 1.0)


def _reader(graph: Graph, placement: Placement, node: Node) -> Node | None:
    """The integer layer that alone reads this layer's output, through nothing that mixes or bends channels."""
    if not is_integer_layer(placement, node) or node.activation not in (None, (0.0, math.inf), (0, math.inf)):
        return None
    if "gamma" not in node.parameters and len(_users(graph, node.parameters["weight"])) > 1:
        return None
    reader = graph.only_reader(node.output)
    while reader is not None and reader.op in KEEPS_CHANNELS and reader.activation is None:
        reader = graph.only_reader(reader.output)
    if reader is None or not is_integer_layer(placement, reader) or len(_users(graph, reader.parameters["weight"])) > 1:
        return None
    if reader.op == "conv" and reader.attributes["groups"] > 1 and not _is_depthwise(reader, graph):
        return None
    channels = len(graph.constants[node.parameters["weight"]])
    weight = graph.constants[reader.parameters["weight"]]
    fits = len(weight) == channels if _is_depthwise(reader, graph) else weight.shape[1] == channels
    return reader if fits else None


def _is_depthwise(node: Node, graph: Graph | None = None) -> bool:
    groups = int(node.attributes["groups"]) if node.op == "conv" else 1
    return groups > 1 and (graph is None or graph.constants[node.parameters["weight"]].shape[:2] == (groups, 1))


def _users(graph: Graph, constant: str) -> list[Node]:
    return [n for n in graph.nodes if constant in n.parameters.values()]


def _scaled_roles(node: Node) -> tuple[str, ...]:
    roles = ("gamma", "beta") if "gamma" in node.parameters else ("weight", "bias")
    return tuple(r for r in roles if r in node.parameters)


def _along(s: NDArray[np.float64], rank: int, axis: int) -> NDArray[np.float64]:
    return s.reshape([-1 if i == axis else 1 for i in range(rank)])


def _reach(graph: Graph, wanted: set[str], x: F32) -> Mapping[str, F32]:
    """Largest absolute activation of every channel (axis 1)."""
    found: dict[str, F32] = {}

    def look(value: str, t: Tensor) -> Tensor:
        if value in wanted:
            rows = t.abs().transpose(0, 1).reshape(t.shape[1], -1).amax(1).numpy()
            found[value] = np.maximum(found[value], rows) if value in found else rows
        return t

    with torch.no_grad():
        for batch in batches(x):
            run(graph, batch, float_parameters(graph), look)
    return found
