"""A softmax (or its logarithm) at the very end is dropped: devices and teachers take it themselves, from the logits."""

from __future__ import annotations

from export.ir import Graph, Node


def drop_final_softmax(graph: Graph, node: Node) -> bool:
    if node.op not in ("softmax", "log_softmax") or node.output != graph.output or node.attributes["axis"] != 1:
        return False
    graph.bypass(node)
    return True
