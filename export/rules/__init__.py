"""Rewrites of the graph, each in its own file: a rule looks at one node and either changes the graph or leaves it.

drop_final_softmax   the bundle's output is the logits
fold_pad             zeros padded before a convolution become its own padding
fold_norm            conv/linear + batch norm become one site
absorb_clamp         ReLU and its kin become the lower and upper end of the producer's codes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from export.ir import Graph, Node
from export.rules.absorb_clamp import absorb_clamp
from export.rules.drop_final_softmax import drop_final_softmax
from export.rules.fold_norm import fold_norm
from export.rules.fold_pad import fold_pad

__all__ = ["RULES", "Rule", "apply_rules"]

Rule = Callable[[Graph, Node], bool]
RULES: tuple[Rule, ...] = (drop_final_softmax, fold_pad, fold_norm, absorb_clamp)


def apply_rules(graph: Graph, rules: Sequence[Rule] = RULES) -> Graph:
    """A rewritten copy: each rule in turn at every node, until it finds no more to do."""
    graph = graph.copy()
    for rule in rules:
        while any(rule(graph, node) for node in list(graph.nodes)):
            graph.prune()
    return graph
