"""Values whose one 8-bit scale loses outputs: boxes of 0 to 320 beside scores of 0 to 1, and whatever else is judged alike.

    concat, stack      inputs of very different ranges meet under one scale
    add                the smaller term falls below a step
    any other value    its channels differ so much, or lie so close together, that 256 codes do not tell them apart

Error is judged where it counts, at every output channel against that channel's own spread; as a share of the whole output a
lost score is nothing. An output that the rounding of a single value already loses is given back by leaving that value in
float: the operator that makes it, and those that would round it again to read it. The inputs of a concatenation keep a scale
each. All of this holds for every target, since no runtime here has a scale for each channel of an activation.

A network that loses no output this way, which is nearly every one, is left as it is, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from export.diagnose.channels import channel_errors, ranges_told
from export.interpret import FakeQuantise, batches, fake_quantise, float_parameters, run, simulated
from export.ir import Graph, Node
from export.operators import Role
from export.placement import Placement
from export.scales import LEVELS, Scale

__all__ = ["SharedScale", "in_float", "lossy_scales"]

F32 = NDArray[np.float32]
LOSSY = 0.25  # error over an output channel's own spread from which it counts as lost: 12 dB are left
SHARE = 0.02  # of the output's channels; a single class of a thousand that hardly varies on these images is no branch
IMAGES = 32  # on which the loss is measured
FEWEST = 8  # images from which the spread of an output channel means something


@dataclass(frozen=True)
class SharedScale:
    """One value that stays in float.

    Attributes:
        name, op: of the node that makes it.
        parts: what meets under one scale, and the largest absolute value of each.
        lost: output channels that the rounding of this value alone would lose.
        nodes: names of the nodes that run in float because of it.
        error: of these outputs, over their own spread; their median.
    """

    name: str
    op: str
    parts: Mapping[str, float]
    lost: tuple[int, ...]
    nodes: tuple[str, ...]
    error: float

    @property
    def reason(self) -> str:
        """A clause for the manifest."""
        if len(self.parts) > 1:
            reach = " and ".join(f"{v:.3g}" for v in self.parts.values())
            met = f"one 8-bit scale for values up to {reach}"
        else:
            met = "one 8-bit scale for its channels"
        return f"{met} would lose outputs {ranges_told(self.lost)}"


def lossy_scales(
    graph: Graph, placement: Placement, scales: Mapping[str, Scale], x: F32, truth: F32
) -> tuple[SharedScale, ...]:
    """Args:
        graph: the float graph after its rules.
        scales: of the values with a scale of their own.
        x, truth: calibration inputs (N, 3, H, W) and the float model's answers (N, classes).

    Returns:
        Values that should stay in float, in execution order; usually none.
    """  # fmt: skip
    part = np.linspace(0, len(x) - 1, min(len(x), IMAGES)).astype(np.int64)
    if len(part) < FEWEST:
        return ()
    x, truth = x[part], truth[part]
    if not len(_lost(graph, x, truth, simulated(scales))[0]):
        return ()
    ranges = _ranges(graph, x)
    found = []
    for value in placement.scaled:
        if scales[value].levels < LEVELS or value == graph.input:
            continue
        lost, error = _lost(graph, x, truth, _only(value, scales[value]))
        if len(lost):
            maker = graph.producers()[value]
            nodes = tuple(n.name for n in _rounding(graph, placement, value))
            found.append(SharedScale(maker.name, maker.op, _parts(maker, ranges), tuple(lost.tolist()), nodes, error))
    return tuple(found)


def in_float(graph: Graph, found: tuple[SharedScale, ...]) -> Graph:
    """The captured graph in which these values are left in float, each node with its reason."""
    reasons = {}
    for shared in found:
        for name in shared.nodes:
            reasons[name] = shared.reason if name == shared.name else f"reads {shared.name}, which stays in float"
    graph = graph.copy()
    graph.nodes = [
        n.with_attributes(keep_float=True, float_reason=reasons[n.name]) if n.name in reasons else n for n in graph.nodes
    ]
    return graph


def _lost(graph: Graph, x: F32, truth: F32, at: FakeQuantise) -> tuple[NDArray[np.int64], float]:
    """Output channels lost when values are rounded by `at`, if they are more than a few; and the median of their errors."""
    parameters = float_parameters(graph)
    with torch.no_grad():
        got = np.concatenate([run(graph, batch, parameters, at).numpy() for batch in batches(x)])
    errors = channel_errors(got, truth)
    lost = np.flatnonzero(errors > LOSSY)
    if len(lost) < SHARE * len(errors):
        lost = lost[:0]
    return lost, float(np.median(errors[lost])) if len(lost) else 0.0


def _only(value: str, scale: Scale) -> FakeQuantise:
    return lambda name, x: fake_quantise(x, scale) if name == value else x


def _ranges(graph: Graph, x: F32) -> dict[str, float]:
    """The largest absolute value of every value."""
    found: dict[str, float] = {}

    def widen(value: str, t: torch.Tensor) -> torch.Tensor:
        found[value] = max(found.get(value, 0.0), float(t.abs().max()))
        return t

    with torch.no_grad():
        for batch in batches(x):
            run(graph, batch, float_parameters(graph), widen)
    return found


def _parts(maker: Node, ranges: Mapping[str, float]) -> dict[str, float]:
    several = maker.op in ("concat", "add")
    return {v: ranges[v] for v in maker.inputs} if several else {maker.output: ranges[maker.output]}


def _rounding(graph: Graph, placement: Placement, value: str) -> Iterator[Node]:
    """The nodes that put `value` on its scale: the one that makes it and those that read it, or its moved codes."""
    shared = {v for v, source in placement.scale_of.items() if source == value}
    for node in graph.nodes:
        touches = node.output == value or any(v in shared for v in node.inputs)
        if touches and placement.roles[node.output] is Role.INTEGER:
            yield node
