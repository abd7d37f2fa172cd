"""Statistics of a domain's images behind the student's present norms, made as a device makes them (`refold.statistics`).

One forward pass measures a norm and applies what it found before the next is measured; a few passes find the images' class mix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloud.distil.norm_mode import Moments, NormCall, NormMode
from refold.statistics import Expectation, StatisticsModel, in_rounds, site_posterior
from refold.statistics.model import CONCENTRATIONS

__all__ = ["Population"]

F64 = NDArray[np.float64]


class Population:
    """A sample of a domain and its class mix, which later passes begin with.

    Args:
        network: anything callable that runs the bundle's batch norms in execution order.
        model: the bundle's statistics model.
        x: the images, float32 (N, C, H, W); all of them are one batch.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], model: StatisticsModel, x: Tensor) -> None:
        self._network, self._model, self._x = network, model, x
        self._mix: F64 | None = None

    def measure(self, strength: float = 1.0) -> list[Moments]:
        """What to serve at every norm with statistics: the exported statistics and the shift.

        Args:
            strength: how much of the shift, 0..1.
        """
        trusts = CONCENTRATIONS if self._mix is None else CONCENTRATIONS[-1:]

        def one(expected: Expectation) -> tuple[list[Moments], NDArray[np.floating]]:
            found, logits = self._pass(expected, strength)
            return found, logits.numpy()

        found, _, _, mix = in_rounds(self._model, float(len(self._x)), one, seen=self._mix, concentrations=trusts)
        if len(self._x):
            self._mix = mix
        return found

    def _pass(self, expected: Expectation, strength: float) -> tuple[list[Moments], Tensor]:
        model, layout = self._model, self._model.layout
        base = layout.row("mean", {}), layout.row("variance", {})
        found: list[Moments] = []

        def rule(call: NormCall) -> Tensor:
            site, cut, seen = call.number, layout.slices[call.number], call.observed()
            mean, variance, _ = site_posterior(
                expected, site, cut, _f64(seen.mean), _f64(seen.variance), base[0][cut], base[1][cut],
                strength * float(model.strength[site]),
            )  # fmt: skip
            found.append(Moments(_f32(mean), _f32(variance)))
            return call.normalise(found[-1])

        with torch.no_grad(), NormMode(rule):
            logits = self._network(self._x)
        return found, logits


def _f64(values: Tensor) -> F64:
    return values.detach().numpy().astype(np.float64)


def _f32(values: F64) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
