"""Where a network's elastic choices are: its integer layers and its scaled values, with their sizes.

The first and the last integer layer are pinned at 8/8 (as in EQ-Net's code). A value that no convolution or linear layer reads
(a branch on its way to an addition, a pooled map) stays at 8 bits as well: no multiplication would become cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from export.ir import Graph, Node
from export.placement import Placement, is_integer_layer
from refold.errors import ModelError

__all__ = ["LayerPlace", "Layout", "ValuePlace", "layout_of"]


@dataclass(frozen=True)
class LayerPlace:
    """One integer layer.

    Attributes:
        name: as in the model; output: the value it makes; source: the scaled value it reads.
        elements, channels: of its weight; multiplications: for one picture.
        pinned: 8-bit weights in every configuration.
    """

    name: str
    output: str
    source: str
    elements: int
    channels: int
    multiplications: int
    pinned: bool


@dataclass(frozen=True)
class ValuePlace:
    """One scaled value; `elements`: numbers in it for one picture. `pinned`: 8-bit codes in every configuration."""

    name: str
    elements: int
    pinned: bool


@dataclass(frozen=True)
class Layout:
    """Layers and values in execution order; `other_bytes`: of norms, biases and float constants."""

    layers: tuple[LayerPlace, ...]
    values: tuple[ValuePlace, ...]
    other_bytes: int

    @cached_property
    def elastic_layers(self) -> tuple[LayerPlace, ...]:
        return tuple(p for p in self.layers if not p.pinned)

    @cached_property
    def elastic_values(self) -> tuple[ValuePlace, ...]:
        return tuple(p for p in self.values if not p.pinned)

    @cached_property
    def layer_shares(self) -> tuple[float, ...]:
        """Of the elastic layers' elements; sum 1."""
        return _shares([p.elements for p in self.elastic_layers])

    @cached_property
    def value_shares(self) -> tuple[float, ...]:
        """Of the elastic values' elements; sum 1."""
        return _shares([p.elements for p in self.elastic_values])


def _shares(sizes: Sequence[int]) -> tuple[float, ...]:
    total = sum(sizes)
    return tuple(s / total for s in sizes)


def layout_of(graph: Graph, placement: Placement) -> Layout:
    """Of a graph after `apply_rules`.

    Raises:
        ModelError: fewer than three integer layers, so that nothing is left between the pinned ones.
    """
    layers = [n for n in graph.nodes if is_integer_layer(placement, n)]
    if len(layers) < 3:
        raise ModelError(
            f"The model has {len(layers)} layers that run in integers; the first and the last stay at 8 bits, so an elastic "
            "training needs at least three.",
            code="no-layers",
        )
    ends = (layers[0], layers[-1])
    pinned = {placement.scale_of[n.inputs[0]] for n in ends}
    pinned |= {placement.scale_of[v] for v in (layers[-1].output, graph.output) if v in placement.scale_of}
    read = {placement.scale_of[n.inputs[0]] for n in layers}
    weights = {n.parameters["weight"] for n in layers}
    return Layout(
        tuple(_place(graph, placement, n, n in ends) for n in layers),
        tuple(ValuePlace(v, _size(graph.shapes[v]), v in pinned or v not in read) for v in placement.scaled),
        sum(4 * graph.constants[c].size for c in {c for n in graph.nodes for c in n.parameters.values()} - weights),
    )


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _place(graph: Graph, placement: Placement, node: Node, pinned: bool) -> LayerPlace:
    weight, out = graph.constants[node.parameters["weight"]].shape, graph.shapes[node.output]
    elements = math.prod(weight)
    # A convolution uses every weight once for each output position; a linear layer once for each row.
    positions = math.prod(out[2:]) if node.op == "conv" else math.prod(out[1:-1])
    source = placement.scale_of[node.inputs[0]]
    return LayerPlace(node.name, node.output, source, elements, weight[0], elements * positions, pinned)
