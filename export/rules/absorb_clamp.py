"""ReLU, ReLU6, hardtanh behind an operator become its `activation`: the codes' own range then does the clamping for nothing."""

from __future__ import annotations

from dataclasses import replace

from export.ir import Graph, Node

ABSORBING = ("conv", "linear", "add", "mul", "concat", "batch_norm", "group_norm", "layer_norm", "avg_pool", "global_avg_pool")


def absorb_clamp(graph: Graph, node: Node) -> bool:
    if node.op != "clamp":
        return False
    source = graph.producers().get(node.inputs[0])
    if source is None or source.op not in ABSORBING or source.activation or graph.only_reader(source.output) is not node:
        return False
    bounds = (node.attributes["low"], node.attributes["high"])
    graph.substitute([source, node], [replace(source.with_attributes(activation=bounds), output=node.output)])
    return True
