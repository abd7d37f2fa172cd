"""What a delivered network really does on this machine: the engine's accuracy, and its time against float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from export.engines import infer, session
from export.fixed_point.deliver import Delivery
from export.ir import Graph, Node
from export.operators import OPERATORS, Role
from export.placement import place
from export.quantise import IntegerModel
from export.targets import TargetProfile, write
from refold.norms import NormTable

__all__ = ["Measured", "float_engine", "measure"]

F32 = NDArray[np.float32]
BLOCKS = 9  # of each engine, in turn, so that a machine whose speed drifts slows both alike
BLOCK_SECONDS = 0.05
LEAST = 3  # inferences in a block


@dataclass(frozen=True)
class Measured:
    """Attributes:
    accuracy: of the engine on the pictures given, or NaN without labels.
    integer_ms, float_ms: median time of one picture, one thread, ONNX Runtime.
    speed_up: median over pairs of blocks of float time over integer time.
    integer_layers: layers with integer weights.
    """

    target: str
    accuracy: float
    integer_ms: float
    float_ms: float
    speed_up: float
    integer_layers: int


def measure(
    delivery: Delivery, target: TargetProfile, x: F32, labels: NDArray[np.int64] | None, power_of_two: bool = False
) -> Measured:
    """Args:
        x: pictures as the network takes them, float32 (N, 3, H, W); the first is timed.

    Raises:
        GateError: ONNX Runtime refuses the model.
        ModelError: see `Delivery.integers`.
    """  # fmt: skip
    # Saturating kernels are fast and right on 7-bit codes; 8-bit codes need exact ones, where this machine has no VNNI.
    engine = session(write(target, delivery.integers(power_of_two=power_of_two), embedded=True).model, exact=target.qmax > 64)
    accuracy = float("nan")
    if labels is not None and len(labels):
        accuracy = float((infer(engine, x).argmax(1) == labels).mean())
    floating, one = session(float_engine(delivery.graph, target)), x[:1]
    integer_s, float_s = _timed(lambda: infer(engine, one), lambda: infer(floating, one))
    ratio = median(f / i for f, i in zip(float_s, integer_s, strict=True))
    layers = len(delivery.given.weights)
    return Measured(target.name, accuracy, 1e3 * median(integer_s), 1e3 * median(float_s), ratio, layers)


def _timed(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of one call, block by block: A B, B A, A B, ... after a first pair that only says how many calls a block has."""
    times: dict[int, list[float]] = {0: [], 1: []}
    counts = [LEAST, LEAST]
    for block in range(BLOCKS + 1):
        for which in (0, 1) if block % 2 else (1, 0):
            started = time.perf_counter()
            for _ in range(counts[which]):
                (first, second)[which]()
            each = (time.perf_counter() - started) / counts[which]
            if block:
                times[which].append(each)
            else:
                counts[which] = max(LEAST, int(BLOCK_SECONDS / each))
    return times[0], times[1]


def float_engine(graph: Graph, target: TargetProfile) -> bytes:
    """The same network for ONNX Runtime in float32, its norms folded into the weights: the fair rival of an integer engine."""
    graph = graph.copy()
    graph.nodes = [_folded(graph, node) for node in graph.nodes]
    return write(target, IntegerModel(graph, place(graph), {}, NormTable(()), {}, target.qmax), embedded=True).model


def _folded(graph: Graph, node: Node) -> Node:
    if OPERATORS[node.op].role is Role.INTEGER:
        node = node.with_attributes(keep_float=True)
    if node.op not in ("conv", "linear") or "gamma" not in node.parameters:
        return node
    held = {role: graph.constants[name].astype(np.float64) for role, name in node.parameters.items()}
    a = held["gamma"] / np.sqrt(held["variance"] + node.attributes["epsilon"])
    weight = held["weight"] * a.reshape(-1, *[1] * (held["weight"].ndim - 1))
    bias = held["beta"] + (held.get("bias", 0.0) - held["mean"]) * a
    names = {"weight": f"{node.name}.folded.weight", "bias": f"{node.name}.folded.bias"}
    graph.constants.update({names["weight"]: weight.astype(np.float32), names["bias"]: bias.astype(np.float32)})
    return replace(node.with_attributes(site=""), parameters=names)
