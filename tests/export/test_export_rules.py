"""Each rewrite rule on a graph of a few nodes: where it applies, and where it must not."""

from __future__ import annotations

import math

import numpy as np

from export.ir import Graph, Node
from export.rules import apply_rules
from export.rules.absorb_clamp import absorb_clamp
from export.rules.drop_final_softmax import drop_final_softmax
from export.rules.fold_norm import fold_norm
from export.rules.fold_pad import fold_pad

CONV = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "groups": 1}
RELU = {"low": 0.0, "high": math.inf}


def graph(*nodes: Node, output: str | None = None) -> Graph:
    return Graph("input", output or nodes[-1].output, list(nodes), {"w": np.ones((1, 1, 1, 1), np.float32)}, {})


def conv(source="input", out="y", **attributes):
    return Node("conv", "conv", (source,), out, {"weight": "w"}, {**CONV, **attributes})


def norm(source="y", out="n"):
    held = {r: r for r in ("gamma", "beta", "mean", "variance")}
    return Node("norm", "batch_norm", (source,), out, held, {"epsilon": 1e-5, "site": "norm"})


def clamp(source, out="r", **bounds):
    return Node("relu", "clamp", (source,), out, {}, bounds or RELU)


def test_all_together_leave_one_node():
    pad = Node("pad", "pad", ("input",), "p", {}, {"before": [0, 0, 0, 0], "after": [0, 0, 1, 2]})
    found = apply_rules(graph(pad, conv("p"), norm(), clamp("n")))
    assert [n.op for n in found.nodes] == ["conv"]
    (node,) = found.nodes
    assert node.inputs == ("input",) and node.output == "r" and node.site == "norm"
    assert node.attributes["pads"] == [0, 0, 1, 2] and node.activation == (0.0, math.inf)
    assert set(node.parameters) == {"weight", "gamma", "beta", "mean", "variance"}


def test_a_norm_stays_where_the_layer_has_another_reader():
    both = Node("add", "add", ("y", "n"), "s")
    g = graph(conv(), norm(), both)
    assert not fold_norm(g, g.nodes[1])
    assert not fold_norm(g, g.nodes[0])


def test_a_norm_does_not_fold_into_a_layer_kept_in_float_or_folded_already():
    g = graph(conv(keep_float=True), norm())
    assert not fold_norm(g, g.nodes[1])
    twice = apply_rules(graph(conv(), norm(), norm("n", "n2")), [fold_norm])
    assert [n.op for n in twice.nodes] == ["conv", "batch_norm"]


def test_a_norm_over_the_networks_output_reader_stays():
    g = graph(conv(), norm(), output="y")
    assert not fold_norm(g, g.nodes[1])


def test_a_clamp_is_absorbed_once_and_not_by_a_reshape():
    g = graph(conv(), clamp("y"), clamp("r", "r2", low=-1.0, high=1.0))
    assert [n.op for n in apply_rules(g, [absorb_clamp]).nodes] == ["conv", "clamp"]
    reshape = Node("flat", "reshape", ("input",), "f", {}, {"shape": (-1, 3)})
    g = graph(reshape, clamp("f"))
    assert not absorb_clamp(g, g.nodes[1])


def test_channel_padding_is_not_a_convolutions_padding():
    pad = Node("pad", "pad", ("input",), "p", {}, {"before": [0, 1, 0, 0], "after": [0, 0, 0, 0]})
    g = graph(pad, conv("p"))
    assert not fold_pad(g, pad)


def test_only_a_final_softmax_over_classes_is_dropped():
    soft = Node("soft", "softmax", ("input",), "s", {}, {"axis": 1})
    g = graph(soft)
    assert drop_final_softmax(g, soft) and g.output == "input" and not g.nodes
    inner = graph(soft, clamp("s"))
    assert not drop_final_softmax(inner, soft)
