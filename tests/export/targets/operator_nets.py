"""One small graph for each operator: stem (conv and norm, 8x8 pictures) → the operator → linear, without torch.export."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.calibrate import calibrate
from export.interpret import float_parameters, run
from export.ir import Graph, Node
from export.quantise import IntegerModel, dequantised_parameters, integer_model, quantised_weights
from export.rounding import prepared

__all__ = ["CASES", "integers", "pictures"]

CLASSES, CHANNELS, SIDE = 5, 8, 8
INF = math.inf


def pictures(count: int = 12, seed: int = 0) -> NDArray[np.float32]:
    """float32 (count, 3, 8, 8): a level and a gradient for each channel, and noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
    slopes = rng.normal(0, 1.5, (count, 3, 3, 1, 1))
    x = slopes[:, :, 0] * rows + slopes[:, :, 1] * columns + slopes[:, :, 2] / 2 + rng.normal(0, 0.2, (count, 3, SIDE, SIDE))
    return x.astype(np.float32)


@dataclass
class Net:
    """A graph that grows. `y` is the value added last; (-1, 8, 8, 8) behind the stem."""

    seed: int = 0
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    y: str = "input"

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def add(self, op: str, *inputs: str, constants: dict[str, Any] | None = None, site: bool = False, **attributes: Any) -> str:
        name = f"{op}{len(self.nodes)}"
        held = {}
        for role, value in (constants or {}).items():
            held[role] = f"{name}.{role}"
            self.constants[held[role]] = np.asarray(value, np.float32)
        if site:
            attributes["site"] = name
        self.nodes.append(Node(f"layer.{name}", op, inputs or (self.y,), name, held, attributes))
        self.y = name
        return name

    def weights(self, *shape: int) -> NDArray[np.float32]:
        return self.rng.normal(0, 1 / math.sqrt(max(math.prod(shape[1:]), 1)), shape).astype(np.float32)

    def conv(
        self, o: int = CHANNELS, i: int = CHANNELS, k: int | tuple[int, int] = 3, *, bias: bool = True,
        strides: Any = (1, 1), pads: Any = (1, 1, 1, 1), dilations: Any = (1, 1), groups: int = 1, **attributes: Any,
    ) -> str:  # fmt: skip
        kernel = (k, k) if isinstance(k, int) else k
        constants = {"weight": self.weights(o, i // groups, *kernel)}
        if bias:
            constants["bias"] = self.rng.normal(0, 0.2, o)
        return self.add("conv", constants=constants, strides=list(strides), pads=list(pads), dilations=list(dilations),
                        groups=groups, **attributes)  # fmt: skip

    def norm(self, op: str = "batch_norm", channels: int = CHANNELS, site: bool = True, **attributes: Any) -> str:
        gamma = self.rng.uniform(0.6, 1.4, channels) * self.rng.choice([1, 1, -1], channels)
        constants = {"gamma": gamma, "beta": self.rng.normal(0, 0.3, channels)}
        if op == "batch_norm":
            constants |= {"mean": self.rng.normal(0, 0.2, channels), "variance": self.rng.uniform(0.3, 1.5, channels)}
        if op == "rms_norm":
            del constants["beta"]
        return self.add(op, constants=constants, site=site, epsilon=1e-3, **attributes)

    def affine(self, scale: float, offset: float) -> str:
        self.add("mul_constant", constants={"value": scale})
        return self.add("add_constant", constants={"value": offset})

    def finished(self, x: NDArray[np.float32]) -> Graph:
        """Flattens, adds the classifier and fills in the shapes."""
        sizes = self._sizes(x, self.y)
        self.add("reshape", shape=(-1, math.prod(sizes[self.y][1:])))
        width = math.prod(sizes[self.nodes[-1].inputs[0]][1:])
        self.add("linear", constants={"weight": self.weights(CLASSES, width), "bias": self.rng.normal(0, 0.1, CLASSES)})
        sizes = self._sizes(x, self.y)
        return Graph("input", self.y, self.nodes, self.constants, {v: (-1, *s[1:]) for v, s in sizes.items()})

    def _sizes(self, x: NDArray[np.float32], output: str) -> dict[str, tuple[int, ...]]:
        graph, found = Graph("input", output, self.nodes, self.constants, {}), {}

        def note(value: str, t: torch.Tensor) -> torch.Tensor:
            found[value] = tuple(t.shape)
            return t

        with torch.no_grad():
            run(graph, torch.from_numpy(x[:2]), float_parameters(graph), note)
        return found


def integers(build: Callable[[Net], object], x: NDArray[np.float32], qmax: int = 64) -> IntegerModel:
    """Stem, what `build` adds, classifier; calibrated on x."""
    net = Net()
    net.conv(CHANNELS, 3)
    net.norm()
    build(net)
    graph, placement = prepared(net.finished(x))
    weights = quantised_weights(graph, placement, qmax)
    calibration = calibrate(graph, placement, x, lambda scales: dequantised_parameters(graph, weights), "minmax")
    return integer_model(graph, placement, weights, calibration.scales, qmax, peak=calibration.peak)


def _two(op: str) -> Callable[[Net], object]:
    def build(n: Net) -> None:
        a = n.conv()
        n.y = n.nodes[1].output
        n.add(op, a, n.conv(k=1, pads=(0,) * 4))

    return build


def _floats(op: str) -> Callable[[Net], object]:
    """Two float factors, both positive."""

    def build(n: Net) -> None:
        a = n.add("abs")
        b = n.affine(0.5, 0.7)
        n.add("exp", a)
        n.add(op, n.y, b) if op != "pow" else n.add(op, n.y, n.add("sigmoid", b))

    return build


def _constant(op: str, value: Any, positive: bool = False, **attributes: Any) -> Callable[[Net], object]:
    def build(n: Net) -> None:
        if positive:
            n.add("abs")
            n.affine(1.0, 0.3)
        n.add(op, constants={"value": value}, **attributes)

    return build


def _clamped(op: str, low: float, high: float) -> Callable[[Net], object]:
    def build(n: Net) -> None:
        if op == "conv":
            n.conv()
        elif op in ("add", "mul"):
            _two(op)(n)
        elif op == "concat":
            a = n.conv()
            n.add("concat", a, n.nodes[1].output, axis=1)
        else:
            n.add(op, kernel=(2, 2), strides=(2, 2), pads=(0,) * 4, ceil=False, count_include_pad=True)
        n.add("clamp", low=low, high=high)

    return build


def _pool(
    op: str, kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, ...], ceil: bool = False, **more: Any
) -> Any:
    if op == "max_pool":
        more["dilations"] = (1, 1)
    return lambda n: n.add(op, kernel=kernel, strides=strides, pads=pads, ceil=ceil, **more)


def _rows(then: Callable[[Net], object]) -> Callable[[Net], object]:
    """(-1, 8, 8, 8) → (-1, 64, 8): tokens with the channels last."""

    def build(n: Net) -> None:
        n.add("reshape", shape=(-1, CHANNELS, 64))
        n.add("transpose", axes=(0, 2, 1))
        then(n)

    return build


def _attention(n: Net) -> None:
    tokens = n.y
    keys = n.add("mul_constant", tokens, constants={"value": n.rng.normal(0, 1, CHANNELS)})
    n.add("matmul", tokens, n.add("transpose", keys, axes=(0, 2, 1)))
    n.affine(0.3, 0.0)
    n.add("softmax", axis=-1)
    n.add("matmul", n.y, tokens)


def _token(n: Net) -> None:
    tokens = n.y
    cls = n.add("expand_constant", tokens, constants={"value": n.rng.normal(0, 1, (1, 1, CHANNELS))})
    n.add("concat", cls, tokens, axis=1)


def _gate(n: Net) -> None:
    """Squeeze-and-excitation: (1, C, 1, 1) times (1, C, H, W)."""
    x = n.y
    n.add("global_avg_pool")
    n.add("sigmoid", n.conv(k=1, pads=(0,) * 4))
    n.add("mul", x, n.y)


def _shuffle(n: Net) -> None:
    n.add("reshape", shape=(-1, 2, 4, 8, 8))
    n.add("transpose", axes=(0, 2, 1, 3, 4))
    n.add("reshape", shape=(-1, 8, 8, 8))
    n.conv()


def _pixel_shuffle(n: Net) -> None:
    n.add("reshape", shape=(-1, 2, 2, 2, 8, 8))
    n.add("transpose", axes=(0, 1, 4, 2, 5, 3))
    n.add("reshape", shape=(-1, 2, 16, 16))


def _mixed_ranks(n: Net) -> None:
    """(-1, 8, 1, 1)-shaped and (8, 8)-shaped values meet."""
    x = n.y
    n.add("mean", axes=(1, 2), keep=False)
    n.add("reshape", shape=(-1, 1, 1, 8))
    n.add("add", x, n.y)


def _transposed(n: Net, k: int, strides: Any, pads: Any, extra: Any) -> None:
    n.add("conv_transpose", constants={"weight": n.weights(CHANNELS, 4, k, k), "bias": n.rng.normal(0, 1, 4)},
          strides=strides, pads=[*pads, *pads], output_padding=extra, groups=1, dilations=[1, 1])  # fmt: skip


def _behind_abs(op: str) -> Callable[[Net], object]:
    def build(n: Net) -> None:
        n.add("abs")
        n.affine(1.0, 0.3)
        n.add(op)

    return build


def _dead(n: Net) -> None:
    """Channels whose gamma is zero: only their offset is left, behind a scale at its floor."""
    n.conv()
    n.norm()
    held = n.nodes[-1].parameters
    n.constants[held["gamma"]][:3], n.constants[held["beta"]][:3] = 0, 0.8


def _silent(n: Net) -> None:
    """A branch a ReLU switches off altogether: its codes have the smallest scale there is, and XNNPACK stays out."""
    trunk = n.y
    n.conv(bias=False)
    n.norm()
    n.constants[n.nodes[-1].parameters["beta"]][:] = -50
    n.add("add", n.add("clamp", low=0.0, high=INF), trunk)


CHANNEL = np.linspace(0.5, 1.5, CHANNELS).reshape(CHANNELS, 1, 1)
VECTOR = np.linspace(-1, 1, CHANNELS)

# name of the case → what it adds; a case's name begins with the operator it is about, up to the first blank
CASES: dict[str, Callable[[Net], object]] = {
    "conv": lambda n: n.conv(12),
    "conv without bias, stride 2": lambda n: n.conv(12, bias=False, strides=(2, 2)),
    "conv with TensorFlow's padding": lambda n: n.conv(strides=(2, 2), pads=(0, 0, 1, 1)),
    "conv valid, 5x3": lambda n: n.conv(k=(5, 3), pads=(0,) * 4),
    "conv stride 3, pads unused": lambda n: n.conv(strides=(3, 3), pads=(1, 1, 1, 1)),
    "conv dilated": lambda n: n.conv(dilations=(2, 2), pads=(2, 2, 2, 2)),
    "conv depthwise": lambda n: n.conv(groups=8, strides=(2, 2)),
    "conv depthwise, two for each": lambda n: n.conv(16, groups=8, pads=(0, 1, 2, 1)),
    "conv grouped": lambda n: n.conv(16, groups=4),
    "conv with dead channels": _dead,
    "conv that is silent": _silent,
    "conv 1x1": lambda n: n.conv(k=1, pads=(0,) * 4),
    "conv in float": lambda n: (n.conv(keep_float=True), n.conv(12, groups=4, keep_float=True, strides=(2, 2))),
    "conv in float, depthwise": lambda n: n.conv(16, groups=8, keep_float=True, bias=False, pads=(0, 0, 1, 1)),
    "linear": _rows(lambda n: (n.add("reshape", shape=(-1, 8)), n.add("linear", constants={"weight": n.weights(6, 8)}),
                               n.add("clamp", low=0.0, high=INF), n.add("reshape", shape=(-1, 64, 6)))),
    "linear in float": lambda n: (n.add("reshape", shape=(-1, 512)), n.add(
        "linear", constants={"weight": n.weights(6, 512), "bias": VECTOR[:6]}, keep_float=True)),
    "conv_transpose": lambda n: _transposed(n, 2, [2, 2], [0, 0], [0, 0]),
    "conv_transpose cut and padded": lambda n: _transposed(n, 3, [2, 2], [1, 1], [1, 1]),
    "conv_transpose padded only": lambda n: _transposed(n, 2, [3, 3], [0, 0], [1, 2]),
    "batch_norm": lambda n: (n.add("abs"), n.norm()),
    "batch_norm of rows": lambda n: (n.add("mean", axes=(2, 3), keep=False), n.norm()),
    "layer_norm": _rows(lambda n: n.norm("layer_norm")),
    "layer_norm without parameters": _rows(lambda n: n.norm("layer_norm", site=False)),
    "layer_norm of channels": lambda n: (n.add("transpose", axes=(0, 2, 3, 1)), n.norm("layer_norm"),
                                         n.add("transpose", axes=(0, 3, 1, 2)), n.conv()),
    "layer_norm of a plain value": lambda n: n.norm("layer_norm", 8),
    "group_norm": lambda n: n.norm("group_norm", groups=2),
    "group_norm of each channel": lambda n: (n.norm("group_norm", groups=8), n.add("clamp", low=0.0, high=INF)),
    "rms_norm": _rows(lambda n: n.norm("rms_norm")),
    "add": _two("add"),
    "add across ranks": _mixed_ranks,
    "mul": _two("mul"),
    "mul by a gate": _gate,
    "sub": _two("sub"),
    "div": _floats("div"),
    "pow": _floats("pow"),
    "maximum": _two("maximum"),
    "minimum": _two("minimum"),
    **{f"{op} then {low:g} to {high:g}": _clamped(op, low, high) for op in ("conv", "add", "mul", "concat")
       for low, high in ((0.0, INF), (0.0, 6.0), (-1.0, 1.0), (-0.5, 0.7))},
    "avg_pool then 0 to inf": _clamped("avg_pool", 0.0, INF),
    "global_avg_pool then 0 to inf": lambda n: (n.add("global_avg_pool"), n.add("clamp", low=0.0, high=INF),
                                                n.conv(k=1, pads=(0,) * 4)),
    "global_avg_pool": lambda n: (n.add("global_avg_pool"), n.conv(k=1, pads=(0,) * 4)),
    "concat": lambda n: n.add("concat", n.nodes[1].output, n.conv(), axis=1),
    "concat of rows": _rows(lambda n: n.add("concat", n.y, n.y, axis=2)),
    "concat in float": lambda n: n.add("concat", n.y, n.add("abs"), axis=1, keep_float=True),
    "sigmoid": lambda n: n.add("sigmoid"),
    "leaky_relu": lambda n: n.add("leaky_relu", slope=0.1),
    "avg_pool": _pool("avg_pool", (2, 2), (2, 2), (0,) * 4, count_include_pad=True),
    "avg_pool with pads counted": _pool("avg_pool", (3, 3), (2, 2), (1,) * 4, count_include_pad=True),
    "avg_pool with pads left out": _pool("avg_pool", (3, 3), (2, 2), (1,) * 4, count_include_pad=False),
    "avg_pool to the end": _pool("avg_pool", (3, 3), (2, 2), (0,) * 4, ceil=True, count_include_pad=True),
    "max_pool": _pool("max_pool", (2, 2), (2, 2), (0,) * 4),
    "max_pool with pads": _pool("max_pool", (3, 3), (2, 2), (1,) * 4),
    "max_pool with pads behind ReLU": lambda n: (n.conv(), n.add("clamp", low=0.0, high=INF),
                                                 _pool("max_pool", (3, 3), (2, 2), (1,) * 4)(n)),
    "max_pool to the end, SAME": _pool("max_pool", (3, 3), (2, 2), (0,) * 4, ceil=True),
    "max_pool in float": lambda n: (n.add("neg"), n.add("add_constant", constants={"value": -3.0}),
                                    _pool("max_pool", (3, 3), (2, 2), (1,) * 4, keep_float=True)(n)),
    "reshape": _shuffle,
    "reshape of pixels": _pixel_shuffle,
    "transpose": lambda n: (n.add("transpose", axes=(0, 1, 3, 2)), n.conv(k=(1, 3), pads=(0,) * 4)),
    "slice": lambda n: (n.add("slice", axis=2, start=1, stop=8, step=2), n.add("slice", axis=1, start=2, stop=6, step=1)),
    "slice to the end": lambda n: n.add("slice", axis=3, start=-5, stop=2**63 - 1, step=1),
    "pad": lambda n: n.add("pad", before=[0, 1, 0, 2], after=[0, 2, 1, 0]),
    "upsample_nearest": lambda n: n.add("upsample_nearest", scales=(2, 3)),
    "upsample_bilinear": lambda n: n.add("upsample_bilinear", size=(13, 5), align_corners=False),
    "upsample_bilinear at corners": lambda n: n.add("upsample_bilinear", size=(13, 5), align_corners=True),
    "clamp": lambda n: (n.add("abs"), n.add("clamp", low=0.2, high=1.1)),
    "clamp of codes": lambda n: (n.add("slice", axis=2, start=1, stop=8, step=1), n.add("clamp", low=0.0, high=INF)),
    "clamp in float": lambda n: (n.affine(1.0, -0.1), n.add("neg"), n.add("clamp", low=0.0, high=INF, keep_float=True)),
    "matmul": _rows(_attention),
    "matmul_constant": _rows(_constant("matmul_constant", np.outer(VECTOR, VECTOR) + np.eye(8))),
    "matmul_constant from the left": _constant("matmul_constant", np.eye(8) + 0.1, reversed=True),
    "softmax": lambda n: n.add("softmax", axis=1),
    "log_softmax": _rows(lambda n: n.add("log_softmax", axis=2)),
    "mean": lambda n: n.add("mean", axes=(2,), keep=False),
    "mean and keep": lambda n: n.add("mean", axes=(-1, 1), keep=True),
    "sum": lambda n: n.add("sum", axes=(1,), keep=False),
    "amax": lambda n: n.add("amax", axes=(2, 3), keep=True),
    "prelu": lambda n: n.add("prelu", constants={"slope": VECTOR / 2}),
    "prelu of rows": lambda n: (n.add("mean", axes=(2, 3), keep=False), n.add("prelu", constants={"slope": VECTOR / 2})),
    "elu": lambda n: n.add("elu", alpha=1.0),
    "elu of another height": lambda n: n.add("elu", alpha=1.7),
    "expand_constant": _rows(_token),
    **{op: (lambda n, op=op: n.add(op)) for op in (
        "tanh", "gelu", "gelu_tanh", "silu", "mish", "hardswish", "hardsigmoid", "softplus", "exp", "neg", "abs", "erf")},
    **{op: _behind_abs(op) for op in ("log", "sqrt", "rsqrt", "reciprocal")},
    "add_constant": _constant("add_constant", CHANNEL),
    "add_constant of a row": _rows(_constant("add_constant", VECTOR)),
    "sub_constant": _constant("sub_constant", 0.7, reversed=True),
    "mul_constant": _constant("mul_constant", CHANNEL),
    "div_constant": _constant("div_constant", CHANNEL, True, reversed=True),
    "pow_constant": _constant("pow_constant", 2.0),
    "pow_constant root": _constant("pow_constant", 0.5, True),
    "pow_constant cube": _constant("pow_constant", 3.0, True),
    "pow_constant reversed": _constant("pow_constant", 2.0, True, reversed=True),
    "maximum_constant": _constant("maximum_constant", CHANNEL - 1),
    "minimum_constant": _constant("minimum_constant", 0.3),
}  # fmt: skip
