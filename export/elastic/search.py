"""Genetic search for the configuration with the best predicted accuracy within budgets (EQ-Net, quant.md §1.3).

Population 100; the best quarter stays; half of the rest are mutations, half uniform crossovers. Nothing outside the budgets is
ever accepted: a child that does not fit is drawn again, and in the end narrowed until it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.elastic.genome import Genome, GenomeSampler
from export.elastic.layout import Layout
from export.elastic.space import Configuration, Form, Space
from refold.errors import UsageError

__all__ = ["Budget", "Evolution", "check_budgets", "least", "search", "within"]

Predict = Callable[[Sequence[Genome]], NDArray[np.float32]]
TRIES = 20  # draws before a child is narrowed instead


@dataclass(frozen=True)
class Budget:
    """A cost and the most there may be of it. `told` writes an amount for people."""

    name: str
    cost: Callable[[Configuration], float]
    most: float
    told: Callable[[float], str] = lambda amount: f"{amount:,.0f}"


@dataclass(frozen=True)
class Evolution:
    """Settings of a search; EQ-Net's, with the mutation probability it meant (its code ran with 0.1)."""

    population: int = 100
    generations: int = 100
    keep: float = 0.25
    mutation: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 8 or self.generations < 0 or not 0 < self.keep < 1 or not 0 < self.mutation <= 1:
            raise UsageError("A search has a population of at least 8; keep and mutation lie between 0 and 1.")


def within(budgets: Sequence[Budget], configuration: Configuration) -> bool:
    """Whether it costs no more than any of them allows."""
    return all(b.cost(configuration) <= b.most for b in budgets)


def least(space: Space, layout: Layout, forms: Sequence[Form], budget: Budget) -> tuple[float, Configuration]:
    """The least cost there is, and a configuration that has it: all costs grow with every bit."""
    w, a = (space.weight_bits[0],) * len(layout.elastic_layers), (space.activation_bits[0],) * len(layout.elastic_values)
    found = [Genome(form, w, a).configuration(space, layout) for form in forms]
    costs = [budget.cost(c) for c in found]
    best = int(np.argmin(costs))
    return costs[best], found[best]


def search(
    space: Space,
    layout: Layout,
    predict: Predict,
    budgets: Sequence[Budget],
    settings: Evolution = Evolution(),
    forms: Sequence[Form] = (),
    seeds: Sequence[Genome] = (),
    on_generation: Callable[[int, float], None] = lambda generation, best: None,
) -> list[Genome]:
    """The last population without repetitions, the best first; every one within every budget.

    Args:
        seeds: of the first population, as far as they fit; the rest is drawn (`GenomeSampler`).

    Raises:
        UsageError: as `check_budgets`.
    """
    check_budgets(space, layout, budgets, forms)
    return _Search(space, layout, predict, budgets, settings, list(forms) or space.forms()).run(seeds, on_generation)


def check_budgets(space: Space, layout: Layout, budgets: Sequence[Budget], forms: Sequence[Form] = ()) -> None:
    """Raises UsageError when no configuration fits; the least possible is told."""
    forms = list(forms) or space.forms()
    for budget in budgets:
        cost, _ = least(space, layout, forms, budget)
        if cost > budget.most:
            raise UsageError(
                f"No configuration fits a budget of {budget.told(budget.most)} ({budget.name}): the least possible is "
                f"{budget.told(cost)} (every layer at {space.weight_bits[0]}, every value at {space.activation_bits[0]} bits, "
                "the first and last at 8).",
                code="budget",
            )
    narrowest = [least(space, layout, [form], budgets[0])[1] for form in forms] if budgets else []
    if budgets and not any(within(budgets, c) for c in narrowest):
        told = " and ".join(f"{b.told(b.most)} ({b.name})" for b in budgets)
        raise UsageError(f"No configuration fits {told} at once: loosen one.", code="budget")


class _Search:
    def __init__(
        self,
        space: Space,
        layout: Layout,
        predict: Predict,
        budgets: Sequence[Budget],
        settings: Evolution,
        forms: Sequence[Form],
    ) -> None:
        self.space, self.layout, self.predict, self.budgets, self.settings = space, layout, predict, budgets, settings
        self.rng = np.random.default_rng((settings.seed, 7))
        self.forms = [f for f in forms if self._fits(self._narrowest(f))]
        self.sampler = GenomeSampler(space, layout, self.forms)

    def _narrowest(self, form: Form) -> Genome:
        w, a = self.space.weight_bits[0], self.space.activation_bits[0]
        return Genome(form, (w,) * len(self.layout.elastic_layers), (a,) * len(self.layout.elastic_values))

    def _fits(self, genome: Genome) -> bool:
        return within(self.budgets, genome.configuration(self.space, self.layout))

    def run(self, seeds: Sequence[Genome], on_generation: Callable[[int, float], None]) -> list[Genome]:
        s = self.settings
        first = [g for g in seeds if self._fits(g)]
        first += [self._fitting(lambda: self.sampler.draw(self.rng)) for _ in range(s.population - len(first))]
        scored = self._ranked(list(dict.fromkeys(first)))
        for generation in range(s.generations):
            parents = scored[: max(2, round(s.keep * s.population))]
            children = [self._fitting(self._child(parents, i % 2 == 0)) for i in range(s.population - len(parents))]
            scored = self._ranked(list(dict.fromkeys([*parents, *children])))
            on_generation(generation + 1, float(self.predict(scored[:1])[0]))
        return scored

    def _ranked(self, population: list[Genome]) -> list[Genome]:
        order = np.argsort(-self.predict(population), kind="stable")
        return [population[i] for i in order]

    def _child(self, parents: list[Genome], mutates: bool) -> Callable[[], Genome]:
        def make() -> Genome:
            a, b = (parents[int(i)] for i in self.rng.integers(len(parents), size=2))
            return self._mutated(a) if mutates else self._crossed(a, b)

        return make

    def _mutated(self, g: Genome) -> Genome:
        p = self.settings.mutation

        def drawn(bits: tuple[int, ...], choices: tuple[int, ...]) -> tuple[int, ...]:
            new, hit = self.rng.choice(choices, len(bits)), self.rng.random(len(bits)) < p
            return tuple(int(n) if h else b for b, n, h in zip(bits, new, hit, strict=True))

        form = self.forms[int(self.rng.integers(len(self.forms)))] if self.rng.random() < p else g.form
        return Genome(form, drawn(g.weight_bits, self.space.weight_bits), drawn(g.activation_bits, self.space.activation_bits))

    def _crossed(self, a: Genome, b: Genome) -> Genome:
        def mixed(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...]:
            first = self.rng.random(len(x)) < 0.5
            return tuple(i if f else j for i, j, f in zip(x, y, first, strict=True))

        form = a.form if self.rng.random() < 0.5 else b.form
        return Genome(form, mixed(a.weight_bits, b.weight_bits), mixed(a.activation_bits, b.activation_bits))

    def _fitting(self, make: Callable[[], Genome]) -> Genome:
        for _ in range(TRIES):
            genome = make()
            if self._fits(genome):
                return genome
        return self._narrowed(genome)

    def _narrowed(self, genome: Genome) -> Genome:
        """One step down at places drawn at random, until it fits; in the end the narrowest of its form."""
        if not self._fits(self._narrowest(genome.form)):
            genome = replace(genome, form=self.forms[int(self.rng.integers(len(self.forms)))])
        bits = [*genome.weight_bits, *genome.activation_bits]
        cut = len(genome.weight_bits)
        choices = [self.space.weight_bits] * cut + [self.space.activation_bits] * (len(bits) - cut)
        while not self._fits(genome):
            wide = [i for i, b in enumerate(bits) if b > choices[i][0]]
            i = wide[int(self.rng.integers(len(wide)))]
            bits[i] = choices[i][choices[i].index(bits[i]) - 1]
            genome = replace(genome, weight_bits=tuple(bits[:cut]), activation_bits=tuple(bits[cut:]))
        return genome
