"""Which values are 8-bit codes, and which operators run in float.

A value is quantised where an INTEGER operator makes it or reads it; a CODES operator hands its input's scale on. The one
exception is the linear layer that makes the logits: its output stays float, which costs nothing and rounds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.ir import Graph, Node
from export.operators import OPERATORS, Role

__all__ = ["Placement", "is_integer_layer", "place"]


@dataclass(frozen=True)
class Placement:
    """Attributes:
    scale_of: quantised value → the value whose scale and zero point it uses (itself, or the source of moved codes).
    roles: value a node makes → how that node runs.
    """

    scale_of: dict[str, str]
    roles: dict[str, Role]

    @property
    def scaled(self) -> list[str]:
        """Values with a scale of their own, in execution order."""
        return [value for value, source in self.scale_of.items() if value == source]

    def is_quantised(self, value: str) -> bool:
        return value in self.scale_of


def is_integer_layer(placement: Placement, node: Node) -> bool:
    """A convolution or linear layer that runs on weight codes."""
    return node.op in ("conv", "linear") and placement.roles[node.output] is Role.INTEGER


def place(graph: Graph) -> Placement:
    """Nodes with the attribute `keep_float` run in float because a person said so."""
    roles = {n.output: Role.FLOAT if n.attributes.get("keep_float") else OPERATORS[n.op].role for n in graph.nodes}
    producers = graph.producers()
    wanted: set[str] = set()
    for node in reversed(graph.nodes):
        role = roles[node.output]
        if role is Role.INTEGER or (role is Role.CODES and node.output in wanted):
            wanted.update(node.inputs)
        if role is Role.INTEGER and not (node.output == graph.output and node.op == "linear"):
            wanted.add(node.output)
    scale_of: dict[str, str] = {graph.input: graph.input} if graph.input in wanted else {}
    for node in graph.nodes:
        role, source = roles[node.output], node.inputs[0]
        if _keeps_the_larger(node) and source in scale_of and producers.get(source) is not None:
            roles[node.output] = role = Role.CODES
        if role is Role.CODES and source in scale_of:
            scale_of[node.output] = scale_of[source]
        elif role is Role.CODES:
            roles[node.output] = Role.FLOAT
            if node.output in wanted:
                scale_of[node.output] = node.output
        elif node.output in wanted:
            scale_of[node.output] = node.output
    return Placement(scale_of, roles)


def _keeps_the_larger(node: Node) -> bool:
    """A ReLU on codes is max(code, zero point): exact, whatever the scale."""
    return node.op == "clamp" and node.attributes["low"] == 0 and math.isinf(node.attributes["high"])
