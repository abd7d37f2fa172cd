"""What a statistics graph must show before it goes into a bundle, per target:

statistics_exported    at strength 0 it answers as the target's engine does
statistics_converged   a run on disturbed images; then the engine, with the statistics that were served refolded into it, gives
                       the graph's own answers: what it measured belongs to the network that will be served
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.quantise import IntegerModel
from export.runtimes import Runtime
from export.statistics.build import Statistics
from export.targets import Artefact
from refold.errors import GateError
from refold.norms import NormState
from refold.statistics import OUTPUTS, Layout, expectation, graph_inputs, unshifted_inputs

__all__ = ["check_statistics"]

F32 = NDArray[np.float32]
IMAGES = 32


def check_statistics(
    target: str, runtime: Runtime, artefact: Artefact, model: IntegerModel, statistics: Statistics, x: F32, float_logits: F32
) -> dict[str, float]:
    """The numbers of the checks: each the share of logits within two output steps.

    Args:
        x: calibration images, float32 (N, 3, H, W), of which the first `IMAGES` are used; `float_logits` the float model's.

    Raises:
        GateError: the graph is another function than the engine.
    """
    layout, x = Layout(model.table), x[:IMAGES]
    step = float(float_logits.max() - float_logits.min()) / 255
    exported = runtime.logits(artefact, model, x)
    noise = max(float(np.sqrt(np.mean((exported - float_logits[:IMAGES]) ** 2))), step)
    _, answers = _run(statistics, x, unshifted_inputs(layout, statistics.moments.count))
    disturbed = np.asarray(0.5 * x + 0.25 * x[::-1], np.float32)  # half the contrast and a ghost image: every layer sees it
    expected = expectation(statistics.moments, layout, statistics.moments.flat, 8.0, len(x))
    given = graph_inputs(layout, {}, expected, np.full(len(layout.sites), 0.5))
    found, shifted = _run(statistics, disturbed, given)
    refolded = runtime.logits(artefact, model, disturbed, _served(layout, found))
    numbers = {}
    for what, ours, theirs in (("exported", answers, exported), ("converged", shifted, refolded)):
        close = float((np.abs(ours - theirs) <= 2 * step).mean())
        apart = float(np.sqrt(np.mean((ours - theirs) ** 2)))
        if close < runtime.tolerance.steps and apart > runtime.tolerance.noise * noise:
            raise GateError(
                f"{target}: the statistics graph and the engine give different answers ({close:.1%} of the logits agree within "
                "two output steps): a device would adapt to another model, so nothing was saved. Please report it.",
                code="statistics-differ",
                detail=f"{what}: {apart:.4g} of {noise:.4g}",
            )
        numbers[f"statistics_{what}"] = close
    return numbers


def _run(statistics: Statistics, x: F32, given: dict[str, F32]) -> tuple[F32, F32]:
    moments, logits = statistics.session.run([OUTPUTS.moments, OUTPUTS.logits], {statistics.input: x, **given})
    return moments, logits


def _served(layout: Layout, moments: F32) -> dict[str, NormState]:
    mean, variance = (moments[OUTPUTS.rows.index(r)] for r in ("served_mean", "served_variance"))
    return {s.name: s.exported.with_statistics(mean[c], variance[c]) for s, c in zip(layout.sites, layout.slices, strict=True)}
