"""conv or linear → batch norm becomes one node with a norm site: the norm will live in its scales and biases.

Only where the norm is the layer's sole reader (quant.md §4.2, point 4): otherwise the norm stays explicit.
"""

from __future__ import annotations

from dataclasses import replace

from export.ir import Graph, Node


def fold_norm(graph: Graph, node: Node) -> bool:
    if node.op != "batch_norm":
        return False
    layer = graph.producers().get(node.inputs[0])
    if layer is None or layer.op not in ("conv", "linear") or "gamma" in layer.parameters or layer.attributes.get("keep_float"):
        return False
    if graph.only_reader(layer.output) is not node:
        return False
    folded = replace(
        layer.with_attributes(site=node.site, epsilon=node.attributes["epsilon"]),
        output=node.output,
        parameters={**layer.parameters, **node.parameters},
    )
    graph.substitute([layer, node], [folded])
    return True
