"""Chooses every activation's scale: a float run sees the ranges, then the observers compete on the network's own output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from export.interpret import BATCH, Parameters, batches, float_parameters, run, simulated, some
from export.ir import Graph
from export.placement import Placement
from export.scales import COMPETING, LEVELS, OBSERVERS, Range, Scale, scale_of, squared_error
from refold.errors import InputError

__all__ = ["Calibration", "calibrate", "output_error"]

CHOICES = ("auto", *OBSERVERS)
MEASURED = 64  # pictures on which the observers compete; the differences between them are far above its noise
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """Scales by value, the float logits they were judged against, and what each observer's output error was.

    Attributes:
        float_logits: float32 (N, classes), of the unquantised model.
        errors: observer → root mean square error of the logits over their standard deviation.
        chosen: the observer kept ("mixed": each activation its own).
    """

    scales: Mapping[str, Scale]
    float_logits: NDArray[np.float32]
    errors: Mapping[str, float]
    chosen: str

    @property
    def peak(self) -> float:
        """The largest |logit|."""
        return float(np.abs(self.float_logits).max())


def calibrate(
    graph: Graph,
    placement: Placement,
    x: NDArray[np.float32],
    quantised: Callable[[Mapping[str, Scale]], Parameters],
    observer: str = "auto",
    progress: Progress = lambda what: None,
    levels: Mapping[str, int] = {},
) -> Calibration:
    """Args:
        x: calibration inputs, float32 (N, 3, H, W).
        quantised: makes the parameters of the integer model (dequantised codes), to measure with.
        observer: one of minmax, percentile, entropy, mse, or auto: the best of the first three (of all where a value has fewer
            levels) and of the mixture in which every activation takes the one of them with the least squared error.
        levels: codes of a value, where not 256.

    Raises:
        InputError: the network gives the same output for every picture.
    """  # fmt: skip
    clamps = {n.output: n.activation for n in graph.nodes if n.activation is not None}
    wanted = set(placement.scaled)
    parameters = float_parameters(graph)
    ranges = {value: Range() for value in wanted}

    once = len(x) <= BATCH  # the range of the only batch is the whole one

    def widen(value: str, t: torch.Tensor) -> torch.Tensor:
        if value in wanted:
            ranges[value].widen(t.numpy())
            if once:
                ranges[value].count(t.numpy())
        return t

    def count(value: str, t: torch.Tensor) -> torch.Tensor:
        if value in wanted:
            ranges[value].count(t.numpy())
        return t

    with torch.no_grad():
        progress("ranges")
        logits = np.concatenate([run(graph, b, parameters, widen).numpy() for b in batches(x)])
        if not np.isfinite(logits).all():
            raise InputError("The model's logits on the calibration pictures are not finite: check --preprocess and weights.")
        if len(logits) > 1 and float(logits.std(0).max()) < 1e-6 * max(1.0, float(np.abs(logits).max())):
            raise InputError(
                "The model answers every calibration picture alike: check --preprocess (the pictures may be scaled wrongly) "
                "and that the calibration set shows different things.",
                code="calibration-uniform",
            )
        if not once:
            progress("histograms")
            for b in batches(x):
                run(graph, b, parameters, count)

    def observed(name: str, value: str) -> Scale:
        steps = levels.get(value, LEVELS)
        return scale_of(*OBSERVERS[name](ranges[value], steps), clamps.get(value), steps)

    competing = OBSERVERS if levels else COMPETING  # fewer levels: clipping matters more
    by_observer = {
        name: {v: observed(name, v) for v in placement.scaled} for name in (competing if observer == "auto" else (observer,))
    }
    if observer == "auto":
        by_observer["mixed"] = {
            v: min((scales[v] for scales in by_observer.values()), key=lambda s, v=v: squared_error(ranges[v], s))  # type: ignore[misc]
            for v in placement.scaled
        }
    errors = {}
    for name, scales in by_observer.items():
        progress(f"observer {name}")
        errors[name] = output_error(graph, x, logits, scales, quantised(scales))
    chosen = min(errors, key=lambda n: errors[n])
    return Calibration(by_observer[chosen], logits, errors, chosen)


def output_error(
    graph: Graph, x: NDArray[np.float32], logits: NDArray[np.float32], scales: Mapping[str, Scale], parameters: Parameters
) -> float:
    """Root mean square error of the simulated integer network's logits over the true ones' standard deviation.

    Args:
        x, logits: inputs (N, 3, H, W) and the float network's answers (N, classes); at most 64 are run, of large ones eight.
        parameters: of the integer network.
    """
    part = some(x, MEASURED)
    own = simulated(scales)
    with torch.no_grad():
        got = np.concatenate([run(graph, b, parameters, own).numpy() for b in batches(x[part])])
    return float(np.sqrt(np.mean((got - logits[part]) ** 2)) / max(float(logits.std()), 1e-12))
