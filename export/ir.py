"""The one graph every writer reads: a short list of nodes over named values, with its constants beside it.

A *value* is an activation tensor; its name is what `refold.norms.ActivationScale.tensor` says. Shapes carry -1 where the batch
is. Constants are float32 numpy arrays under the names of the model's state dict. What an operator computes is in
`export.operators`; how a runtime is told so is in `export.targets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Graph", "Node"]


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        name: what a person calls the layer: its module path where it has one, else the value's name.
        op: a key of `export.operators.OPERATORS`.
        inputs: values it reads.
        output: the value it makes.
        parameters: role (weight, bias, gamma, ...) to the name of a constant.
        attributes: strides, axes and the like; `activation` (low, high) once a clamp was absorbed; `site` where a norm is.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def with_attributes(self, **changed: Any) -> Node:
        return replace(self, attributes={**self.attributes, **changed})

    @property
    def site(self) -> str:
        """Name of the norm site this node carries, or ""."""
        return str(self.attributes.get("site", ""))

    @property
    def activation(self) -> tuple[float, float] | None:
        found: tuple[float, float] | None = self.attributes.get("activation")
        return found


@dataclass
class Graph:
    """Nodes in execution order, their constants and shapes; one input and one output value."""

    input: str
    output: str
    nodes: list[Node]
    constants: dict[str, NDArray[np.float32]]
    shapes: dict[str, tuple[int, ...]]

    def copy(self) -> Graph:
        return Graph(self.input, self.output, list(self.nodes), dict(self.constants), dict(self.shapes))

    def producers(self) -> dict[str, Node]:
        return {n.output: n for n in self.nodes}

    def consumers(self) -> dict[str, list[Node]]:
        """Value to the nodes that read it, in order; the graph's own output is not a node."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                found.setdefault(value, []).append(node)
        return found

    def only_reader(self, value: str) -> Node | None:
        """The one node that reads `value`, if exactly one does and the value is not the graph's output."""
        readers = [n for n in self.nodes if value in n.inputs]
        return readers[0] if len(readers) == 1 and value != self.output and readers[0].inputs.count(value) == 1 else None

    def substitute(self, old: Iterable[Node], new: Iterable[Node]) -> None:
        """Puts `new` where the last of `old` was; every value they made that others still read must be made again."""
        gone = list(old)
        last = max(self.nodes.index(n) for n in gone)
        nodes = [*self.nodes[: last + 1], *new, *self.nodes[last + 1 :]]
        self.nodes = [n for n in nodes if not any(n is g for g in gone)]

    def bypass(self, node: Node) -> None:
        """Takes out a node that changes nothing: its readers read its input."""
        source = node.inputs[0]
        self.nodes = [
            replace(n, inputs=tuple(source if i == node.output else i for i in n.inputs)) for n in self.nodes if n is not node
        ]
        if self.output == node.output:
            self.output = source

    def prune(self) -> None:
        """Drops nodes whose output nobody reads."""
        wanted, kept = {self.output}, []
        for node in reversed(self.nodes):
            if node.output in wanted:
                wanted.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
