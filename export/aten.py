"""The ATen operators export understands, each a few lines that add nodes to the graph (`export.lower`)."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from export.lower import Lowering, Several, handles
from refold.errors import ModelError

aten = torch.ops.aten


def pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * 2 if len(values) == 1 else values)]


def axis_of(low: Lowering, node: fx.Node, axis: int, index: int = 0) -> int:
    return axis % len(rank_of(low, node, index))


def rank_of(low: Lowering, node: fx.Node, index: int = 0) -> tuple[int, ...]:
    raw = node.args[index]
    first = raw[0] if isinstance(raw, (list, tuple)) else raw
    return low.shape_of(first) if isinstance(first, fx.Node) else ()


def axes_of(low: Lowering, node: fx.Node, axes: Any) -> list[int]:
    rank = len(rank_of(low, node))
    return sorted(a % rank for a in ([axes] if isinstance(axes, int) else axes or range(rank)))


def refuse(low: Lowering, node: fx.Node, why: str) -> ModelError:
    return ModelError(f"Layer {low.layer(node)} {why}.", code="operator")


# ---- layers with weights


@handles(aten.conv2d.default, aten.conv2d.padding)
def conv2d(low: Lowering, node: fx.Node, out: str) -> str:
    weight, bias = low.arg(node, 1), low.arg(node, 2)
    if not isinstance(weight, Tensor):
        raise refuse(low, node, "is a convolution whose weights depend on the picture")
    strides, dilations = pair(low.arg(node, 3, "stride", 1)), pair(low.arg(node, 5, "dilation", 1))
    padding = low.arg(node, 4, "padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        pads = [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    else:
        pads = pair(0 if padding == "valid" else padding) * 2
    return low.add(
        "conv", [low.arg(node, 0)], out, name=low.owner(weight, low.layer(node)),
        parameters={"weight": weight, "bias": bias}, strides=strides, pads=pads, dilations=dilations,
        groups=low.arg(node, 6, "groups", 1),
    )  # fmt: skip


@handles(aten.conv_transpose2d.input)
def conv_transpose2d(low: Lowering, node: fx.Node, out: str) -> str:
    weight = low.arg(node, 1)
    strides, padding, extra = (low.arg(node, i, "", d) for i, d in ((3, 1), (4, 0), (5, 0)))
    return low.add(
        "conv_transpose", [low.arg(node, 0)], out, name=low.owner(weight, low.layer(node)),
        parameters={"weight": weight, "bias": low.arg(node, 2)}, strides=pair(strides), pads=pair(padding) * 2,
        output_padding=pair(extra), groups=low.arg(node, 6, "", 1), dilations=pair(low.arg(node, 7, "", 1)),
    )  # fmt: skip


@handles(aten.linear.default)
def linear(low: Lowering, node: fx.Node, out: str) -> str:
    weight = low.arg(node, 1)
    if not isinstance(weight, Tensor):
        raise refuse(low, node, "is a linear layer whose weights depend on the picture")
    name, shape = low.owner(weight, low.layer(node)), rank_of(low, node)
    parameters = {"weight": weight, "bias": low.arg(node, 2)}
    if len(shape) == 2:
        return low.add("linear", [low.arg(node, 0)], out, name=name, parameters=parameters)
    rows = low.reshape(low.arg(node, 0), f"{out}_rows", (-1, shape[-1]))
    product = low.add("linear", [rows], f"{out}_product", name=name, parameters=parameters, shape_made=(-1, weight.shape[0]))
    return low.reshape(product, out, low.shape_of(node), low.layer(node))


# ---- norms


@handles(aten.batch_norm.default)
def batch_norm(low: Lowering, node: fx.Node, out: str) -> str:
    x, gamma, beta, mean, variance, training, _, epsilon = (low.arg(node, i) for i in range(8))
    if training or mean is None:
        raise refuse(low, node, "normalises with the statistics of each batch: call .eval() in the function that makes the "
                     "model, and keep track_running_stats=True")  # fmt: skip
    return _batch_norm(low, node, out, x, gamma, beta, mean, variance, epsilon)


def _batch_norm(
    low: Lowering, node: fx.Node, out: str, x: str, gamma: Any, beta: Any, mean: Tensor, variance: Tensor, epsilon: float
) -> str:
    site = low.owner(gamma if gamma is not None else mean, low.layer(node))
    affine = {
        "gamma": torch.ones_like(mean) if gamma is None else gamma,
        "beta": torch.zeros_like(mean) if beta is None else beta,
    }
    return low.add(
        "batch_norm", [x], out, name=site, parameters={**affine, "mean": mean, "variance": variance},
        epsilon=float(epsilon), site=site, shape_made=rank_of(low, node),
    )  # fmt: skip


@handles(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm(low: Lowering, node: fx.Node, out: str) -> Several:
    x, gamma, beta, mean, variance, _, epsilon = (low.arg(node, i) for i in range(7))
    return Several([_batch_norm(low, node, out, x, gamma, beta, mean, variance, epsilon), None, None])


@handles(aten.layer_norm.default)
def layer_norm(low: Lowering, node: fx.Node, out: str) -> str:
    x, size = low.arg(node, 0), list(low.arg(node, 1))
    gamma, beta, epsilon = low.arg(node, 2), low.arg(node, 3), float(low.arg(node, 4, "eps", 1e-5))
    site = low.owner(gamma, low.layer(node))
    if len(size) > 1:
        raise refuse(low, node, "is a LayerNorm over several axes; only the last axis is supported: use GroupNorm(1, channels)")
    affine = {"gamma": torch.ones(size) if gamma is None else gamma, "beta": torch.zeros(size) if beta is None else beta}
    return low.add(
        "layer_norm", [x], out, name=site, parameters=affine, epsilon=epsilon, site=site if gamma is not None else ""
    )


@handles(aten.rms_norm.default)
def rms_norm(low: Lowering, node: fx.Node, out: str) -> str:
    x, size, gamma = low.arg(node, 0), list(low.arg(node, 1)), low.arg(node, 2)
    if len(size) > 1:
        raise refuse(low, node, "is an RMSNorm over several axes; only the last axis is supported")
    epsilon = low.arg(node, 3, "eps")
    site = low.owner(gamma, low.layer(node))
    return low.add(
        "rms_norm", [x], out, name=site, parameters={"gamma": torch.ones(size) if gamma is None else gamma},
        epsilon=torch.finfo(torch.float32).eps if epsilon is None else float(epsilon), site=site if gamma is not None else "",
    )  # fmt: skip


def _grouped(low: Lowering, node: fx.Node, out: str, groups: int, gamma: Any, beta: Any, epsilon: float) -> str:
    channels = rank_of(low, node)[1]
    site = low.owner(gamma, low.layer(node))
    affine = {
        "gamma": torch.ones(channels) if gamma is None else gamma,
        "beta": torch.zeros(channels) if beta is None else beta,
    }
    return low.add(
        "group_norm", [low.arg(node, 0)], out, name=site, parameters=affine, groups=groups, epsilon=epsilon,
        site=site if gamma is not None else "",
    )  # fmt: skip


@handles(aten.group_norm.default)
def group_norm(low: Lowering, node: fx.Node, out: str) -> str:
    gamma, beta = low.arg(node, 2, "weight"), low.arg(node, 3, "bias")
    return _grouped(low, node, out, low.arg(node, 1), gamma, beta, float(low.arg(node, 4, "eps", 1e-5)))


@handles(aten.instance_norm.default)
def instance_norm(low: Lowering, node: fx.Node, out: str) -> str:
    gamma, beta, of_input = (low.arg(node, i) for i in (1, 2, 5))
    if not of_input:
        raise refuse(low, node, "is an InstanceNorm with running statistics: use BatchNorm, which computes the same")
    return _grouped(low, node, out, rank_of(low, node)[1], gamma, beta, float(low.arg(node, 7)))


# ---- activation functions


def _clamp(low: Lowering, node: fx.Node, out: str, low_bound: float, high_bound: float) -> str:
    return low.add("clamp", [low.arg(node, 0)], out, low=low_bound, high=high_bound)


@handles(aten.relu.default, aten.relu_.default)
def relu(low: Lowering, node: fx.Node, out: str) -> str:
    return _clamp(low, node, out, 0.0, math.inf)


@handles(aten.relu6.default, aten.relu6_.default)
def relu6(low: Lowering, node: fx.Node, out: str) -> str:
    return _clamp(low, node, out, 0.0, 6.0)


@handles(aten.hardtanh.default, aten.hardtanh_.default)
def hardtanh(low: Lowering, node: fx.Node, out: str) -> str:
    return _clamp(low, node, out, float(low.arg(node, 1, "min_val", -1.0)), float(low.arg(node, 2, "max_val", 1.0)))


@handles(aten.clamp.default, aten.clamp_.default)
def clamp(low: Lowering, node: fx.Node, out: str) -> str:
    below, above = low.arg(node, 1, "min"), low.arg(node, 2, "max")
    return _clamp(low, node, out, -math.inf if below is None else float(below), math.inf if above is None else float(above))


@handles(aten.clamp_min.default, aten.clamp_min_.default)
def clamp_min(low: Lowering, node: fx.Node, out: str) -> str:
    return _clamp(low, node, out, float(low.arg(node, 1)), math.inf)


@handles(aten.clamp_max.default, aten.clamp_max_.default)
def clamp_max(low: Lowering, node: fx.Node, out: str) -> str:
    return _clamp(low, node, out, -math.inf, float(low.arg(node, 1)))


for _name in ("sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid", "exp", "log", "sqrt", "rsqrt", "reciprocal", "neg",
              "abs", "erf"):  # fmt: skip
    for _form in (_name, f"{_name}_"):
        if hasattr(aten, _form):

            @handles(getattr(aten, _form).default)
            def _unary(low: Lowering, node: fx.Node, out: str, op: str = _name) -> str:
                return low.add(op, [low.arg(node, 0)], out)


@handles(aten.gelu.default, aten.gelu_.default)
def gelu(low: Lowering, node: fx.Node, out: str) -> str:
    exact = low.arg(node, 1, "approximate", "none") == "none"
    return low.add("gelu" if exact else "gelu_tanh", [low.arg(node, 0)], out)


@handles(aten.softplus.default)
def softplus(low: Lowering, node: fx.Node, out: str) -> str:
    if low.arg(node, 1, "beta", 1) != 1:
        raise refuse(low, node, "is a softplus with beta other than 1")
    return low.add("softplus", [low.arg(node, 0)], out)


@handles(aten.leaky_relu.default, aten.leaky_relu_.default)
def leaky_relu(low: Lowering, node: fx.Node, out: str) -> str:
    return low.add("leaky_relu", [low.arg(node, 0)], out, slope=float(low.arg(node, 1, "negative_slope", 0.01)))


@handles(aten.elu.default, aten.elu_.default)
def elu(low: Lowering, node: fx.Node, out: str) -> str:
    alpha, scale, inner = (float(low.arg(node, i, n, 1.0)) for i, n in ((1, "alpha"), (2, "scale"), (3, "input_scale")))
    if inner != 1:
        raise refuse(low, node, "is a CELU")
    if scale == 1:
        return low.add("elu", [low.arg(node, 0)], out, alpha=alpha)
    unscaled = low.add("elu", [low.arg(node, 0)], f"{out}_unscaled", alpha=alpha, shape_made=low.shape_of(node))
    return low.add("mul_constant", [unscaled], out, parameters={"value": torch.tensor(scale)})


@handles(aten.prelu.default)
def prelu(low: Lowering, node: fx.Node, out: str) -> str:
    return low.add("prelu", [low.arg(node, 0)], out, parameters={"slope": low.arg(node, 1)})


@handles(aten.softmax.int, aten._softmax.default)
def softmax(low: Lowering, node: fx.Node, out: str) -> str:
    return low.add("softmax", [low.arg(node, 0)], out, axis=axis_of(low, node, low.arg(node, 1)))


@handles(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(low: Lowering, node: fx.Node, out: str) -> str:
    return low.add("log_softmax", [low.arg(node, 0)], out, axis=axis_of(low, node, low.arg(node, 1)))


# ---- arithmetic of two


def _arithmetic(op: str, targets: tuple[Any, ...]) -> None:
    @handles(*targets)
    def run(low: Lowering, node: fx.Node, out: str) -> str:
        a, b = low.arg(node, 0), low.arg(node, 1)
        alpha = low.arg(node, 2, "alpha", 1) if op in ("add", "sub") else 1
        if node.kwargs.get("rounding_mode"):
            raise refuse(low, node, f"is a torch.{op} with a rounding_mode")
        if not isinstance(alpha, (int, float)):
            raise refuse(low, node, f"is a torch.{op} whose alpha is not a number")
        if alpha != 1 and isinstance(b, str):
            shape = rank_of(low, node, 1)
            b = low.add(
                "mul_constant", [b], f"{out}_scaled", parameters={"value": torch.tensor(float(alpha))}, shape_made=shape
            )
        elif alpha != 1 and isinstance(b, (Tensor, int, float)):
            b = b * alpha
        if isinstance(a, str) and isinstance(b, str):
            return low.add(op, [a, b], out)
        value, source = (a, b) if isinstance(b, str) else (b, a)
        if not isinstance(value, (Tensor, int, float)):
            raise refuse(low, node, f"is a torch.{op} with the batch size")
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value))
        return low.add(f"{op}_constant", [source], out, parameters={"value": value}, reversed=isinstance(b, str))


_arithmetic("add", (aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor, aten.add_.Scalar))
_arithmetic("sub", (aten.sub.Tensor, aten.sub.Scalar, aten.sub_.Tensor, aten.sub_.Scalar))
_arithmetic("mul", (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar))
_arithmetic("div", (aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar))
_arithmetic("pow", (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor))
_arithmetic("maximum", (aten.maximum.default,))
_arithmetic("minimum", (aten.minimum.default,))


@handles(aten.square.default)
def square(low: Lowering, node: fx.Node, out: str) -> str:
    return low.add("pow_constant", [low.arg(node, 0)], out, parameters={"value": torch.tensor(2.0)}, reversed=False)


@handles(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(low: Lowering, node: fx.Node, out: str) -> str:
    value = torch.as_tensor(low.arg(node, 1), dtype=torch.float32)
    return low.add("sub_constant", [low.arg(node, 0)], out, parameters={"value": value}, reversed=True)


@handles(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(low: Lowering, node: fx.Node, out: str) -> str:
    a, b = low.arg(node, 0), low.arg(node, 1)
    if isinstance(a, str) and isinstance(b, str):
        return low.add("matmul", [a, b], out)
    if isinstance(b, Tensor) and b.dim() >= 2 and b.numel() == b.shape[-2] * b.shape[-1]:
        shape, weight = rank_of(low, node), b.reshape(b.shape[-2:]).t().contiguous()
        name = low.owner(b, low.layer(node))
        rows = low.reshape(a, f"{out}_rows", (-1, shape[-1]))
        product = low.add(
            "linear", [rows], f"{out}_product", name=name, parameters={"weight": weight}, shape_made=(-1, b.shape[-1])
        )
        return low.reshape(product, out, low.shape_of(node), low.layer(node))
    value, source = (a, b) if isinstance(a, Tensor) else (b, a)
    return low.add("matmul_constant", [source], out, parameters={"value": value}, reversed=isinstance(a, Tensor))


@handles(aten.addmm.default)
def addmm(low: Lowering, node: fx.Node, out: str) -> str:
    weight = low.arg(node, 2)
    if not isinstance(weight, Tensor):
        raise refuse(low, node, "is an addmm of two activations")
    parameters = {"weight": weight.t().contiguous(), "bias": low.arg(node, 0)}
    return low.add("linear", [low.arg(node, 1)], out, name=low.owner(weight, low.layer(node)), parameters=parameters)


@handles(aten.scaled_dot_product_attention.default)
def attention(low: Lowering, node: fx.Node, out: str) -> str:
    q, k, v, mask = (low.arg(node, i, "attn_mask" if i == 3 else "") for i in range(4))
    if low.arg(node, 5, "is_causal", False):
        raise refuse(low, node, "is causal attention, which image models do not use")
    shape, keys = rank_of(low, node), rank_of(low, node, 1)
    scale = low.arg(node, 6, "scale") or 1 / math.sqrt(shape[-1])
    rank = len(shape)
    scores = (*shape[:-1], keys[-2])
    turned = low.add("transpose", [k], f"{out}_kt", shape_made=(*keys[:-2], keys[-1], keys[-2]),
                     axes=[*range(rank - 2), rank - 1, rank - 2])  # fmt: skip
    product = low.add("matmul", [q, turned], f"{out}_product", shape_made=scores)
    last = low.add("mul_constant", [product], f"{out}_scaled", shape_made=scores,
                   parameters={"value": torch.tensor(float(scale))})  # fmt: skip
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        last = low.add("add_constant", [last], f"{out}_masked", shape_made=scores, parameters={"value": mask})
    elif mask is not None:
        raise refuse(low, node, "is attention with a mask that is not a constant to add")
    weights = low.add("softmax", [last], f"{out}_weights", shape_made=scores, axis=rank - 1)
    return low.add("matmul", [weights, v], out)


# ---- pooling and resizing


@handles(aten.max_pool2d.default)
def max_pool(low: Lowering, node: fx.Node, out: str) -> str:
    kernel = pair(low.arg(node, 1))
    strides = pair(low.arg(node, 2, "stride") or kernel)
    pads, dilations = pair(low.arg(node, 3, "padding", 0)), pair(low.arg(node, 4, "dilation", 1))
    return low.add("max_pool", [low.arg(node, 0)], out, kernel=kernel, strides=strides, pads=pads * 2, dilations=dilations,
                   ceil=bool(low.arg(node, 5, "ceil_mode", False)))  # fmt: skip


@handles(aten.avg_pool2d.default)
def avg_pool(low: Lowering, node: fx.Node, out: str) -> str:
    kernel = pair(low.arg(node, 1))
    strides = pair(low.arg(node, 2, "stride") or kernel)
    if low.arg(node, 6, "divisor_override") is not None:
        raise refuse(low, node, "is an average pooling with its own divisor")
    return _avg_pool(low, node, out, kernel, strides, pair(low.arg(node, 3, "padding", 0)),
                     bool(low.arg(node, 4, "ceil_mode", False)), bool(low.arg(node, 5, "count_include_pad", True)))  # fmt: skip


def _avg_pool(
    low: Lowering, node: fx.Node, out: str, kernel: list[int], strides: list[int], pads: list[int], ceil: bool, include: bool
) -> str:
    _, _, height, width = rank_of(low, node)
    if kernel == [height, width] and not any(pads):
        return low.add("global_avg_pool", [low.arg(node, 0)], out)
    return low.add("avg_pool", [low.arg(node, 0)], out, kernel=kernel, strides=strides, pads=pads * 2, ceil=ceil,
                   count_include_pad=include)  # fmt: skip


@handles(aten.adaptive_avg_pool2d.default)
def adaptive_avg_pool(low: Lowering, node: fx.Node, out: str) -> str | None:
    _, _, height, width = rank_of(low, node)
    _, _, rows, columns = low.shape_of(node)
    if (rows, columns) == (height, width):
        return low.arg(node, 0)  # type: ignore[no-any-return]
    if height % rows or width % columns:
        raise refuse(low, node, f"pools {height}x{width} adaptively to {rows}x{columns}, which does not divide")
    kernel = [height // rows, width // columns]
    return _avg_pool(low, node, out, kernel, kernel, [0, 0], False, True)


@handles(aten.adaptive_max_pool2d.default)
def adaptive_max_pool(low: Lowering, node: fx.Node, out: str) -> Several:
    _, _, height, width = rank_of(low, node)
    rows, columns = pair(low.arg(node, 1))
    if height % rows or width % columns:
        raise refuse(low, node, f"pools {height}x{width} adaptively to {rows}x{columns}, which does not divide")
    kernel = [height // rows, width // columns]
    low.add("max_pool", [low.arg(node, 0)], out, kernel=kernel, strides=kernel, pads=[0] * 4, dilations=[1, 1], ceil=False,
            shape_made=(*rank_of(low, node)[:2], rows, columns))  # fmt: skip
    return Several([out, None])


@handles(aten.mean.dim, aten.mean.default)
def mean(low: Lowering, node: fx.Node, out: str) -> str:
    axes, keep = axes_of(low, node, low.arg(node, 1, "dim")), bool(low.arg(node, 2, "keepdim", False))
    shape = rank_of(low, node)
    if 0 in axes and shape[0] == -1:
        raise refuse(low, node, "averages over the batch")
    if axes != [2, 3] or len(shape) != 4:
        return low.add("mean", [low.arg(node, 0)], out, axes=axes, keep=keep)
    if keep:
        return low.add("global_avg_pool", [low.arg(node, 0)], out)
    pooled = low.add("global_avg_pool", [low.arg(node, 0)], f"{out}_pool", shape_made=(*shape[:2], 1, 1))
    return low.reshape(pooled, out, low.shape_of(node))


@handles(aten.sum.dim_IntList)
def total(low: Lowering, node: fx.Node, out: str) -> str:
    axes = axes_of(low, node, low.arg(node, 1, "dim"))
    return low.add("sum", [low.arg(node, 0)], out, axes=axes, keep=bool(low.arg(node, 2, "keepdim", False)))


@handles(aten.amax.default)
def amax(low: Lowering, node: fx.Node, out: str) -> str:
    axes = axes_of(low, node, low.arg(node, 1, "dim"))
    return low.add("amax", [low.arg(node, 0)], out, axes=axes, keep=bool(low.arg(node, 2, "keepdim", False)))


@handles(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
def upsample_nearest(low: Lowering, node: fx.Node, out: str) -> str:
    before, after = rank_of(low, node), low.shape_of(node)
    if after[2] % before[2] or after[3] % before[3]:
        raise refuse(low, node, "resizes to the nearest pixel by a factor that is not whole")
    return low.add("upsample_nearest", [low.arg(node, 0)], out, scales=(after[2] // before[2], after[3] // before[3]))


@handles(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default)
def upsample_bilinear(low: Lowering, node: fx.Node, out: str) -> str:
    return low.add("upsample_bilinear", [low.arg(node, 0)], out, size=low.shape_of(node)[2:],
                   align_corners=bool(low.arg(node, 2, "align_corners", False)))  # fmt: skip


# ---- moving things about


@handles(
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.clone.default, aten.contiguous.default,
    aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default,
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.to.device,
)  # fmt: skip
def identity(low: Lowering, node: fx.Node, out: str) -> str:
    if "dropout" in str(node.target) and low.arg(node, 2):
        raise refuse(low, node, "drops out at random: call .eval() in the function that makes the model")
    value = node.meta["val"]
    if value.dtype != torch.float32:
        raise refuse(low, node, f"changes the activations to {value.dtype}: export the float32 model")
    return low.arg(node, 0)  # type: ignore[no-any-return]


@handles(
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, aten._unsafe_view.default, aten.view_as.default,
)  # fmt: skip
def reshape(low: Lowering, node: fx.Node, out: str) -> str:
    return low.reshape(low.arg(node, 0), out, low.shape_of(node), low.layer(node))


@handles(aten.pixel_shuffle.default)
def pixel_shuffle(low: Lowering, node: fx.Node, out: str) -> str:
    r, (n, c, h, w) = int(low.arg(node, 1)), rank_of(low, node)
    c //= r * r
    parts = low.reshape(low.arg(node, 0), f"{out}_parts", (n, c, r, r, h, w))
    order = low.add("transpose", [parts], f"{out}_order", axes=[0, 1, 4, 2, 5, 3], shape_made=(n, c, h, r, w, r))
    return low.reshape(order, out, low.shape_of(node))


@handles(aten.channel_shuffle.default)
def channel_shuffle(low: Lowering, node: fx.Node, out: str) -> str:
    groups, (n, c, h, w) = int(low.arg(node, 1)), rank_of(low, node)
    parts = low.reshape(low.arg(node, 0), f"{out}_parts", (n, groups, c // groups, h, w))
    order = low.add("transpose", [parts], f"{out}_order", axes=[0, 2, 1, 3, 4], shape_made=(n, c // groups, groups, h, w))
    return low.reshape(order, out, low.shape_of(node))


@handles(aten.permute.default)
def permute(low: Lowering, node: fx.Node, out: str) -> str:
    rank = len(rank_of(low, node))
    return low.add("transpose", [low.arg(node, 0)], out, axes=[a % rank for a in low.arg(node, 1)])


@handles(aten.movedim.int, aten.movedim.intlist)
def movedim(low: Lowering, node: fx.Node, out: str) -> str:
    rank = len(rank_of(low, node))
    source, target = (
        [a % rank for a in (g if isinstance(g, (list, tuple)) else [g])] for g in (low.arg(node, 1), low.arg(node, 2))
    )
    axes = [a for a in range(rank) if a not in source]
    for place, axis in sorted(zip(target, source, strict=True)):
        axes.insert(int(place), int(axis))
    return low.add("transpose", [low.arg(node, 0)], out, axes=axes)


@handles(aten.roll.default)
def roll(low: Lowering, node: fx.Node, out: str) -> str:
    last, shape, shifts, axes = low.arg(node, 0), rank_of(low, node), low.arg(node, 1), low.arg(node, 2, "dims", [])
    if len(axes) != len(shifts):
        raise refuse(low, node, "rolls the batch")  # without dims, everything as one row
    for i, (axis, shift) in enumerate(zip([a % len(shape) for a in axes], shifts, strict=True)):
        if shape[axis] == -1:
            raise refuse(low, node, "rolls the batch")
        at = -shift % shape[axis]
        parts = [
            _cut(low, last, f"{out}_{i}a", shape, axis, at, shape[axis]),
            _cut(low, last, f"{out}_{i}b", shape, axis, 0, at),
        ]
        last = low.add("concat", parts, f"{out}_{i}", axis=axis, shape_made=shape) if at else last
    return low.reshape(last, out, shape)


@handles(aten.linalg_vector_norm.default)
def vector_norm(low: Lowering, node: fx.Node, out: str) -> str:
    order, axes = low.arg(node, 1, "ord", 2), axes_of(low, node, low.arg(node, 2, "dim"))
    if order != 2:
        raise refuse(low, node, f"is a vector norm of order {order}; only 2 is supported")
    source, shape = low.arg(node, 0), rank_of(low, node)
    square = low.add("mul", [source, source], f"{out}_square", shape_made=shape, keep_float=True)
    total = low.add("sum", [square], f"{out}_sum", axes=axes, keep=bool(low.arg(node, 3, "keepdim", False)),
                    shape_made=low.shape_of(node))  # fmt: skip
    return low.add("sqrt", [total], out)


@handles(aten.transpose.int, aten.t.default, aten.swapaxes.default, aten.mT.default)
def transpose(low: Lowering, node: fx.Node, out: str) -> str:
    axes = list(range(len(rank_of(low, node))))
    a, b = (low.arg(node, 1, "", -2) % len(axes), low.arg(node, 2, "", -1) % len(axes))
    axes[a], axes[b] = axes[b], axes[a]
    return low.add("transpose", [low.arg(node, 0)], out, axes=axes)


def _cut(low: Lowering, source: str, out: str, shape: tuple[int, ...], axis: int, start: int, stop: int, step: int = 1) -> str:
    made = list(shape)
    made[axis] = len(range(start, stop, step))
    return low.add("slice", [source], out, shape_made=made, axis=axis, start=start, stop=stop, step=step)


def cut(
    low: Lowering, source: str, out: str, shape: tuple[int, ...], axis: int, start: int, stop: int
) -> list[tuple[str, int]]:
    """Rows start to stop of an axis as values with their lengths: the parts a write put there, where they are whole."""
    if start >= stop:
        return []
    if (start, stop) == (0, shape[axis]) and source not in low.pieces:
        return [(source, stop)]
    at, parts = low.pieces.get(source, (-1, []))
    if at != axis:
        return [(_cut(low, source, out, shape, axis, start, stop), stop - start)]
    found, end = [], 0
    for i, (part, length) in enumerate(parts):
        begin, end = end, end + length
        first, last = max(start, begin) - begin, min(stop, end) - begin
        size = (*shape[:axis], length, *shape[axis + 1 :])
        if first < last:
            found += cut(low, part, f"{out}_{i}", size, axis, first, last)
    return found


@handles(aten.slice.Tensor)
def slice_(low: Lowering, node: fx.Node, out: str) -> str:
    axis, shape = axis_of(low, node, low.arg(node, 1, "dim", 0)), rank_of(low, node)
    start, stop, step = (low.arg(node, i, n, d) for i, n, d in ((2, "start", None), (3, "end", None), (4, "step", 1)))
    if shape[axis] == -1:
        if start in (None, 0) and stop in (None, 2**63 - 1) and step == 1:
            return low.arg(node, 0)  # type: ignore[no-any-return]
        raise refuse(low, node, "cuts the batch into pieces")
    begin, end, step = slice(start, stop, step).indices(shape[axis])
    if (begin, end, step) == (0, shape[axis], 1):
        return low.arg(node, 0)  # type: ignore[no-any-return]
    if step == 1 and low.pieces.get(low.arg(node, 0), (-1, []))[0] == axis:
        parts = cut(low, low.arg(node, 0), f"{out}_part", shape, axis, begin, end)
        if len(parts) == 1:
            return parts[0][0]
    return _cut(low, low.arg(node, 0), out, shape, axis, begin, end, step)


@handles(aten.narrow.default)
def narrow(low: Lowering, node: fx.Node, out: str) -> str:
    axis, shape = axis_of(low, node, low.arg(node, 1)), rank_of(low, node)
    if shape[axis] == -1:
        raise refuse(low, node, "cuts the batch into pieces")
    start = low.arg(node, 2) % shape[axis]
    return _cut(low, low.arg(node, 0), out, shape, axis, start, start + low.arg(node, 3))


@handles(aten.select.int)
def select(low: Lowering, node: fx.Node, out: str) -> str:
    axis, shape = axis_of(low, node, low.arg(node, 1)), rank_of(low, node)
    if shape[axis] == -1:
        raise refuse(low, node, "picks one picture of the batch")
    index = low.arg(node, 2) % shape[axis]
    part = _cut(low, low.arg(node, 0), f"{out}_part", shape, axis, index, index + 1)
    return low.reshape(part, out, low.shape_of(node), low.layer(node))


@handles(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, aten.unbind.int)
def split(low: Lowering, node: fx.Node, out: str) -> Several:
    unbind = node.target == aten.unbind.int
    axis, shape = axis_of(low, node, low.arg(node, 1 if unbind else 2, "dim", 0)), rank_of(low, node)
    if shape[axis] == -1:
        raise refuse(low, node, "splits the batch")
    parts, start = Several(), 0
    for i, piece in enumerate(node.meta["val"]):
        made = tuple(int(s) if isinstance(s, int) else -1 for s in piece.shape)
        size = 1 if unbind else made[axis]
        part = _cut(low, low.arg(node, 0), f"{out}_{i}", shape, axis, start, start + size)
        parts.append(low.reshape(part, f"{out}_{i}_one", made) if unbind else part)
        start += size
    return parts


@handles(operator.getitem)
def getitem(low: Lowering, node: fx.Node, out: str) -> str | None:
    found = low.arg(node, 0)[low.arg(node, 1)]
    if found is None and node.users:
        raise refuse(low, node, "uses the indices of a max pooling")
    return found  # type: ignore[no-any-return]


@handles(aten.pad.default, aten.constant_pad_nd.default)
def pad(low: Lowering, node: fx.Node, out: str) -> str:
    widths = list(low.arg(node, 1))
    mode = low.arg(node, 2, "mode", "constant") if node.target == aten.pad.default else "constant"
    value = low.arg(node, 3 if node.target == aten.pad.default else 2, "value", 0)
    if mode != "constant" or value not in (0, None, 0.0):
        raise refuse(low, node, "pads with something other than zeros")
    if min(widths) < 0:
        raise refuse(low, node, "pads by a negative width: use a slice")
    rank = len(rank_of(low, node))
    before, after = [0] * rank, [0] * rank
    for i in range(len(widths) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = widths[2 * i], widths[2 * i + 1]
    return low.add("pad", [low.arg(node, 0)], out, before=before, after=after)


@handles(aten.cat.default, aten.concat.default, aten.stack.default)
def concat(low: Lowering, node: fx.Node, out: str) -> str:
    parts, axis = list(low.arg(node, 0)), low.arg(node, 1, "dim", 0)
    shape = low.shape_of(node)
    axis %= len(shape)
    if shape[axis] == -1:
        raise refuse(low, node, "joins along the batch")
    if node.target == aten.stack.default:
        one = (*shape[:axis], 1, *shape[axis + 1 :])
        parts = [low.reshape(p, f"{out}_{i}", one) if isinstance(p, str) else p.unsqueeze(axis) for i, p in enumerate(parts)]
    if any(isinstance(p, Tensor) for p in parts):
        parts = [with_batch(low, node, p, f"{out}_c{i}") if isinstance(p, Tensor) else p for i, p in enumerate(parts)]
    return low.add("concat", parts, out, axis=axis)


def with_batch(low: Lowering, node: fx.Node, value: Tensor, out: str) -> str:
    """A constant repeated for every picture."""
    if value.shape[0] != 1:
        raise refuse(low, node, "joins a constant whose first axis is not 1 with activations")
    return low.add("expand_constant", [low.graph.input], out, parameters={"value": value}, shape_made=(-1, *value.shape[1:]))


@handles(aten.expand.default, aten.expand_as.default)
def expand(low: Lowering, node: fx.Node, out: str) -> str:
    value, shape = low.arg(node, 0), low.shape_of(node)
    if isinstance(value, Tensor):
        if shape[0] != -1:
            raise refuse(low, node, "expands a constant by the batch size on another axis than the first")
        full = low.remember(value.expand(1, *shape[1:]).contiguous(), low.names.get(id(value), f"{out}.value"))
        return with_batch(low, node, full, out)
    if rank_of(low, node) == shape:
        return value  # type: ignore[no-any-return]
    ones = low.remember(torch.ones([1 if s == -1 else s for s in shape]), f"{out}.ones")
    return low.add("mul_constant", [value], out, parameters={"value": ones})
