"""pad → conv becomes conv with these pads, also where the sides differ (TensorFlow's SAME with stride 2)."""

from __future__ import annotations

from dataclasses import replace

from export.ir import Graph, Node


def fold_pad(graph: Graph, node: Node) -> bool:
    if node.op != "pad" or len(node.attributes["before"]) != 4:
        return False
    before, after = node.attributes["before"], node.attributes["after"]
    reader = graph.only_reader(node.output)
    if reader is None or reader.op != "conv" or any(before[:2]) or any(after[:2]):
        return False
    top, left, bottom, right = reader.attributes["pads"]
    pads = [top + before[2], left + before[3], bottom + after[2], right + after[3]]
    graph.substitute([node, reader], [replace(reader.with_attributes(pads=pads), inputs=node.inputs)])
    return True
