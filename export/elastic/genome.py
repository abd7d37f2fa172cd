"""A configuration of one form as a search handles it: the form, and the bits of every elastic place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.elastic.layout import Layout
from export.elastic.space import Configuration, Form, Space

__all__ = ["BitSampler", "Genome", "GenomeSampler", "genome_of"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Genome:
    """weight_bits, activation_bits: of the elastic layers and values, in layout order."""

    form: Form
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]

    def configuration(self, space: Space, layout: Layout) -> Configuration:
        return space.assemble(layout, self.form, self.weight_bits, self.activation_bits)


def genome_of(layout: Layout, configuration: Configuration) -> Genome:
    """Raises ValueError when the parts of the configuration do not share one form."""
    if configuration.form is None:
        raise ValueError("The parts of this configuration do not share one form.")
    return Genome(
        configuration.form,
        tuple(configuration.weight[p.name].bits for p in layout.elastic_layers),
        tuple(configuration.activation[v.name].bits for v in layout.elastic_values),
    )


class BitSampler:
    """P(bits of each place | their average, weighted by the places' sizes).

    EQ-Net counts this table from random assignments, which leaves its ends empty: the average of many uniform draws is hardly
    ever below 3 or above 7 bits. Drawing every place by itself with P(b) proportional to exp(t share b), t such that the mean
    is right, is what the counts tend to (Gibbs' conditioning principle), and reaches every average.
    """

    def __init__(self, choices: Sequence[int], shares: Sequence[float]) -> None:
        self.choices = np.asarray(choices, float)
        self.shares = np.asarray(shares, float)
        self._known: dict[float, F64] = {}

    def probabilities(self, average: float) -> F64:
        """float64 (places, choices); averages beyond what the choices allow are met as nearly as they can be."""
        key = round(average, 1)
        if key not in self._known:
            self._known[key] = self._tilted(key)
        return self._known[key]

    def _tilted(self, average: float) -> F64:
        strength = self.shares / self.shares.max(initial=1e-12)
        low, high = -200.0, 200.0
        for _ in range(60):
            middle = (low + high) / 2
            table = middle * strength[:, None] * (self.choices - self.choices.mean())
            table = np.exp(table - table.max(1, keepdims=True))
            table /= table.sum(1, keepdims=True)
            if float(self.shares @ (table @ self.choices)) < average:
                low = middle
            else:
                high = middle
        return np.asarray(table)

    def draw(self, average: float, rng: np.random.Generator) -> tuple[int, ...]:
        cumulative = self.probabilities(average).cumsum(1)
        place = (rng.random(len(self.shares))[:, None] > cumulative[:, :-1]).sum(1)
        return tuple(int(b) for b in self.choices[place])


class GenomeSampler:
    """Random genomes whose average bits are spread evenly, as EQ-Net's predictor is taught with (2.4 to 7.6 of 2 to 8)."""

    def __init__(self, space: Space, layout: Layout, forms: Sequence[Form] = ()) -> None:
        self.space, self.forms = space, list(forms) or space.forms()
        self.weights = BitSampler(space.weight_bits, layout.layer_shares)
        self.values = BitSampler(space.activation_bits, layout.value_shares)

    def draw(self, rng: np.random.Generator) -> Genome:
        form = self.forms[int(rng.integers(len(self.forms)))]
        ends = [(min(b) + 0.4, max(b) - 0.4) for b in (self.space.weight_bits, self.space.activation_bits)]
        w, a = (rng.uniform(low, high) if low < high else math.fsum((low, high)) / 2 for low, high in ends)
        return Genome(form, self.weights.draw(w, rng), self.values.draw(a, rng))
