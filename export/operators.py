"""What every operator of the graph computes, in torch, and where it may run.

    INTEGER   reads 8-bit codes and makes 8-bit codes of another scale
    CODES     moves codes about (or keeps the larger): the output has the input's scale and zero point, exactly
    FLOAT     has no integer form here: runs in float between a dequantisation and a quantisation

One definition serves the float calibration run, the measured choice of scales and the cloud's student, which differ only in
the parameters they pass: float weights or dequantised codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from export.ir import Node

__all__ = ["OPERATORS", "Norm", "Operator", "Role", "batch_norm", "evaluate"]

Parameters = Mapping[str, Tensor]
Norm = Callable[[Node, Tensor, Parameters], Tensor]
Evaluate = Callable[[Node, Sequence[Tensor], Parameters], Tensor]


class Role(Enum):
    INTEGER = 1
    CODES = 2
    FLOAT = 3


def batch_norm(node: Node, x: Tensor, p: Parameters) -> Tensor:
    """Batch normalisation with the statistics among the parameters: what a device runs."""
    return F.batch_norm(x, p["mean"], p["variance"], p["gamma"], p["beta"], False, 0.0, node.attributes["epsilon"])


@dataclass(frozen=True)
class Operator:
    """`reason` says, for people, why a FLOAT operator is one."""

    evaluate: Evaluate
    role: Role
    reason: str = ""


def evaluate(node: Node, inputs: Sequence[Tensor], parameters: Parameters, norm: Norm = batch_norm) -> Tensor:
    """Runs one node: the operator, the norm folded behind it, the activation function it absorbed.

    Args:
        inputs: float32 activations, batch first unless the model moved it.
        parameters: by role; gamma, beta, mean and variance where the node carries a folded norm.
        norm: computes every batch norm, folded or not; a training puts the batch's own statistics here.
    """
    explicit = node.op == "batch_norm"
    y = norm(node, inputs[0], parameters) if explicit else OPERATORS[node.op].evaluate(node, inputs, parameters)
    if node.op in FOLDING and "gamma" in parameters:
        y = norm(node, y, parameters)
    if node.activation is not None:
        y = _clamp(y, *node.activation)
    return y


FOLDING = ("conv", "linear")


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    if low == 0 and math.isinf(high):
        return F.relu(x)
    return x.clamp(None if math.isinf(low) else low, None if math.isinf(high) else high)


def _conv(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    a, x = node.attributes, xs[0]
    top, left, bottom, right = a["pads"]
    padding = [top, left]
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), [0, 0]
    return F.conv2d(x, p["weight"], p.get("bias"), a["strides"], padding, a["dilations"], a["groups"])


def _conv_transpose(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    a = node.attributes
    top, left, _, _ = a["pads"]
    return F.conv_transpose2d(
        xs[0], p["weight"], p.get("bias"), a["strides"], [top, left], a["output_padding"], a["groups"], a["dilations"]
    )


def _max_pool(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    a = node.attributes
    return F.max_pool2d(xs[0], a["kernel"], a["strides"], a["pads"][:2], a["dilations"], a["ceil"])


def _avg_pool(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    a = node.attributes
    return F.avg_pool2d(xs[0], a["kernel"], a["strides"], a["pads"][:2], a["ceil"], a["count_include_pad"])


def _slice(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    a = node.attributes
    index = [slice(None)] * xs[0].dim()
    index[a["axis"]] = slice(a["start"], a["stop"], a["step"])
    return xs[0][tuple(index)]


def _pad(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    before, after = node.attributes["before"], node.attributes["after"]
    pairs = [v for i in reversed(range(len(before))) for v in (before[i], after[i])]
    return F.pad(xs[0], pairs)


def _expand_constant(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    value = p["value"]
    return value.expand(xs[0].shape[0], *value.shape[1:])


def _constant_binary(op: Callable[[Tensor, Tensor], Tensor]) -> Evaluate:
    def run(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
        return op(p["value"], xs[0]) if node.attributes.get("reversed") else op(xs[0], p["value"])

    return run


def _unary(op: Callable[[Tensor], Tensor]) -> Evaluate:
    return lambda node, xs, p: op(xs[0])


def _binary(op: Callable[[Tensor, Tensor], Tensor]) -> Evaluate:
    return lambda node, xs, p: op(xs[0], xs[1])


def _rms_norm(node: Node, xs: Sequence[Tensor], p: Parameters) -> Tensor:
    return F.rms_norm(xs[0], p["gamma"].shape, p["gamma"], node.attributes["epsilon"])


ELEMENTWISE = "no 8-bit kernel for this function in ONNX Runtime"
REDUCTION = "its sums need more than 8 bits"
NORM = "its statistics depend on the data: the affine part stays explicit"
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": torch.sub,
    "div": torch.div,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "neg": torch.neg,
    "abs": torch.abs,
    "erf": torch.erf,
}

OPERATORS: dict[str, Operator] = {
    "conv": Operator(_conv, Role.INTEGER),
    "linear": Operator(lambda n, xs, p: F.linear(xs[0], p["weight"], p.get("bias")), Role.INTEGER),
    "add": Operator(_binary(torch.add), Role.INTEGER),
    "mul": Operator(_binary(torch.mul), Role.INTEGER),
    "concat": Operator(lambda n, xs, p: torch.cat(list(xs), n.attributes["axis"]), Role.INTEGER),
    "sigmoid": Operator(_unary(torch.sigmoid), Role.INTEGER),
    "leaky_relu": Operator(lambda n, xs, p: F.leaky_relu(xs[0], n.attributes["slope"]), Role.INTEGER),
    "avg_pool": Operator(_avg_pool, Role.INTEGER),
    "global_avg_pool": Operator(lambda n, xs, p: xs[0].mean((2, 3), keepdim=True), Role.INTEGER),
    "max_pool": Operator(_max_pool, Role.CODES),
    "reshape": Operator(lambda n, xs, p: xs[0].reshape(n.attributes["shape"]), Role.CODES),
    "transpose": Operator(lambda n, xs, p: xs[0].permute(n.attributes["axes"]), Role.CODES),
    "slice": Operator(_slice, Role.CODES),
    "pad": Operator(_pad, Role.CODES),
    "upsample_nearest": Operator(
        lambda n, xs, p: F.interpolate(xs[0], scale_factor=n.attributes["scales"], mode="nearest"), Role.CODES
    ),
    "clamp": Operator(lambda n, xs, p: _clamp(xs[0], n.attributes["low"], n.attributes["high"]), Role.FLOAT, ELEMENTWISE),
    "batch_norm": Operator(
        lambda n, xs, p: batch_norm(n, xs[0], p), Role.FLOAT, "no convolution or linear layer directly before it to fold into"
    ),
    "layer_norm": Operator(
        lambda n, xs, p: F.layer_norm(xs[0], p["gamma"].shape, p["gamma"], p["beta"], n.attributes["epsilon"]), Role.FLOAT, NORM
    ),
    "group_norm": Operator(
        lambda n, xs, p: F.group_norm(xs[0], n.attributes["groups"], p["gamma"], p["beta"], n.attributes["epsilon"]),
        Role.FLOAT,
        NORM,
    ),
    "rms_norm": Operator(_rms_norm, Role.FLOAT, NORM),
    "conv_transpose": Operator(_conv_transpose, Role.FLOAT, "ONNX Runtime has no 8-bit transposed convolution"),
    "matmul": Operator(_binary(torch.matmul), Role.FLOAT, "both factors are activations"),
    "matmul_constant": Operator(
        _constant_binary(torch.matmul), Role.FLOAT, "its weights are on the wrong side for an 8-bit kernel"
    ),
    "softmax": Operator(lambda n, xs, p: F.softmax(xs[0], n.attributes["axis"]), Role.FLOAT, REDUCTION),
    "log_softmax": Operator(lambda n, xs, p: F.log_softmax(xs[0], n.attributes["axis"]), Role.FLOAT, REDUCTION),
    "mean": Operator(lambda n, xs, p: xs[0].mean(n.attributes["axes"], n.attributes["keep"]), Role.FLOAT, REDUCTION),
    "sum": Operator(lambda n, xs, p: xs[0].sum(n.attributes["axes"], n.attributes["keep"]), Role.FLOAT, REDUCTION),
    "amax": Operator(lambda n, xs, p: xs[0].amax(n.attributes["axes"], n.attributes["keep"]), Role.FLOAT, REDUCTION),
    "elu": Operator(lambda n, xs, p: F.elu(xs[0], n.attributes["alpha"]), Role.FLOAT, ELEMENTWISE),
    "prelu": Operator(lambda n, xs, p: F.prelu(xs[0], p["slope"]), Role.FLOAT, ELEMENTWISE),
    "upsample_bilinear": Operator(
        lambda n, xs, p: F.interpolate(
            xs[0], size=n.attributes["size"], mode="bilinear", align_corners=n.attributes["align_corners"]
        ),
        Role.FLOAT,
        ELEMENTWISE,
    ),
    "expand_constant": Operator(_expand_constant, Role.FLOAT, "a constant"),
    **{f"{name}_constant": Operator(_constant_binary(op), Role.FLOAT, ELEMENTWISE) for name, op in _BINARY.items()},
    **{name: Operator(_binary(op), Role.FLOAT, ELEMENTWISE) for name, op in _BINARY.items() if name not in ("add", "mul")},
    **{name: Operator(_unary(op), Role.FLOAT, ELEMENTWISE) for name, op in _UNARY.items()},
}
