"""Finds the integers of a captured float model: bits, scales, and the treatments that lower the output error.

    sensitivities ─► bits by layer ─► attempt ─► attempt on equalised layers ─► the better one, biases corrected

Without a budget or a treatment this is one attempt: round, calibrate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.bits import EIGHT, BitPlan
from export.calibrate import Calibration, calibrate, output_error
from export.ir import Graph
from export.placement import Placement, place
from export.ptq import LayerSensitivity, SharedScale, correct_bias, equalise, in_float, lossy_scales, mixed, sensitivity
from export.quantise import WeightCodes, dequantised_parameters, integer_model, quantised_weights
from export.rules import apply_rules
from export.scales import Scale

__all__ = ["Attempt", "Found", "Rounding", "prepared", "round_off", "round_off_shared"]

F32 = NDArray[np.float32]
Progress = Callable[[str], None]
EQUALISED = 128  # pictures whose largest activations are looked at


@dataclass(frozen=True)
class Rounding:
    """What a person may choose; see `export.pipeline.Options`."""

    observer: str = "auto"
    bits: BitPlan = EIGHT
    budget: int | None = None
    equalise: bool = False
    correct_bias: bool = False


@dataclass(frozen=True)
class Attempt:
    """One way to round: a captured graph, its rules applied, the integers, their scales, and how far off the answers are."""

    captured: Graph
    graph: Graph
    placement: Placement
    weights: Mapping[str, WeightCodes]
    calibration: Calibration

    @property
    def error(self) -> float:
        return self.calibration.errors[self.calibration.chosen]


@dataclass(frozen=True)
class Found:
    """The best attempt.

    Attributes:
        plan: the bits it has.
        truth: the float graph its integers stand for, before any bias was corrected.
        treated: treatment → output error (without it, with it).
        sensitivities: where a budget decided.
    """

    best: Attempt
    plan: BitPlan
    truth: Graph
    treated: Mapping[str, tuple[float, float]]
    sensitivities: tuple[LayerSensitivity, ...]


def prepared(captured: Graph) -> tuple[Graph, Placement]:
    """The graph after its rules, and where everything runs."""
    graph = apply_rules(captured)
    return graph, place(graph)


def round_off(captured: Graph, x: F32, qmax: int, how: Rounding, progress: Progress) -> Found:
    """Args:
        captured: norms apart, weights in float.
        x: calibration inputs, float32 (N, 3, H, W).
        qmax: the largest code the targets' kernels take.

    Raises:
        UsageError: no bits fit into the budget.
        ModelError, InputError: as `integer_model` and `calibrate`.
    """  # fmt: skip
    graph, placement = prepared(captured)
    plan, rows = how.bits, tuple[LayerSensitivity, ...]()
    if how.budget is not None:
        rows = tuple(sensitivity(graph, placement, x, qmax, progress=progress))
        plan = plan.over(mixed(rows, how.budget)[0])
    best = _attempt(captured, x, qmax, how.observer, plan, progress)
    treated: dict[str, tuple[float, float]] = {}
    if how.equalise:
        progress("equalising layers")
        even = _with(captured, equalise(graph, placement, x[:EQUALISED]))
        other = _attempt(even, x, qmax, how.observer, plan, progress)
        treated["equalise"] = (best.error, other.error)
        best = other if other.error < best.error else best
    truth = best.graph
    if how.correct_bias:
        progress("correcting biases")
        other = _corrected(best, x)
        treated["correct_bias"] = (best.error, other.error)
        best = other if other.error < best.error else best
    return Found(best, plan, truth, treated, rows)


def round_off_shared(
    captured: Graph, x: F32, qmax: int, how: Rounding, progress: Progress
) -> tuple[Found, tuple[SharedScale, ...]]:
    """`round_off`, again without the scales that lose outputs, until none does; arguments and errors as there.

    Returns:
        (the best attempt, the values left in float for it).
    """
    shared: tuple[SharedScale, ...] = ()
    while True:
        found = round_off(captured, x, qmax, how, progress)
        best = found.best
        more = lossy_scales(found.truth, best.placement, best.calibration.scales, x, best.calibration.float_logits)
        if not more:
            return found, shared
        progress(f"leaving {more[0].name} in float")
        captured, shared = in_float(captured, more), (*shared, *more)


def _attempt(captured: Graph, x: F32, qmax: int, observer: str, plan: BitPlan, progress: Progress) -> Attempt:
    graph, placement = prepared(captured)
    weights = quantised_weights(graph, placement, qmax, plan)
    # Refuses a model without norms before minutes of calibration.
    integer_model(graph, placement, weights, dict.fromkeys(placement.scaled, Scale(1.0, 0)), qmax)
    calibration = calibrate(
        graph,
        placement,
        x,
        lambda scales: dequantised_parameters(graph, weights),
        observer,
        lambda w: progress(f"calibrating: {w}"),
        plan.levels(graph, placement),
    )
    return Attempt(captured, graph, placement, weights, calibration)


def _corrected(a: Attempt, x: F32) -> Attempt:
    """The same integers and scales, judged by the same float answers, behind corrected biases."""
    scales = a.calibration.scales
    captured = _with(a.captured, correct_bias(a.graph, a.placement, a.weights, scales, x))
    graph, placement = prepared(captured)
    error = output_error(graph, x, a.calibration.float_logits, scales, dequantised_parameters(graph, a.weights))
    calibration = replace(a.calibration, errors={**a.calibration.errors, a.calibration.chosen: error})
    return Attempt(captured, graph, placement, a.weights, calibration)


def _with(captured: Graph, constants: Mapping[str, F32]) -> Graph:
    graph = captured.copy()
    graph.constants.update(constants)
    return graph
