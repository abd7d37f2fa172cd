"""Choosing bits with a real model: the measurements that `search` asks for, and which of its answers is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from export.experts import search
from export.experts.measure import ORIGINAL, Measure
from export.experts.report import Searched
from export.experts.search import Costs, Importance, Outcome
from export.experts.tokens import Windows
from export.experts.work import Work
from refold.experts import BITS

if TYPE_CHECKING:
    from export.experts.pipeline import Options

__all__ = ["Judge", "choose", "spread"]

Key = tuple[int, int]
Steps = Sequence[tuple[Key, int]]


class Judge(search.Judge):
    """A search's judge that measures with the model, keeps each loss in the work folder, and tells how far it is."""

    def __init__(self, measure: Measure, windows: Windows, work: Work, stage: Callable[[str, int], None]) -> None:
        super().__init__(measure.loss, windows.digest, work.evaluations, work.note)
        self.measure, self.windows = measure, windows
        self._before, self._stage = frozenset(work.evaluations), stage

    def stage(self, what: str, losses: int) -> None:
        """Announces that many losses."""
        self._stage(what, losses * len(self.windows.ids))

    def passed(self, plan: Mapping[Key, int]) -> None:
        """Runs the plan's pass, known loss or not: its routing is wanted."""
        fresh = self.fresh
        self.loss(plan)
        if self.fresh == fresh:
            self.measure.loss(plan)

    @property
    def resumed(self) -> int:
        """Losses that an earlier run had measured."""
        return len(self.asked & self._before)


def choose(judge: Judge, size: Mapping[int, int], options: Options) -> tuple[Searched, dict[Key, float]]:
    """Bits for every expert, and the shares of tokens that each was used by at 4 bits.

    Args:
        size: bytes of a record, by bits.

    Raises:
        ModelError: the tolerance cannot be met. UsageError: the size is too small for 2 bits.
    """
    measure = judge.measure
    keys = measure.source.order
    judge.stage("measuring the checkpoint and each width", 1 + len(BITS))
    original = judge.loss(dict.fromkeys(keys, ORIGINAL))
    judge.passed(dict.fromkeys(keys, search.MIDDLE))
    frequency, used = measure.frequency(), {k for k in keys if measure.count(*k)}
    costs = Costs(keys, size, frequency)
    uniform = {b: judge.loss(costs.uniform(b)) for b in BITS}
    if options.importance == "loss":
        judge.stage("importance of each expert", 2 * len(used))
        found = search.importance(judge, costs, used.__contains__)
    else:
        found = _by_output(judge, costs)
    steps = search.ladder(costs, found)
    judge.stage("searching", 2 * int(np.ceil(np.log2(len(keys) + 1))))
    walk: tuple[int, ...] = ()
    if options.size is not None:
        outcomes = _by_size(judge, costs, steps, options.size)
        taken = min(outcomes, key=lambda o: (o.loss, costs.total(o.plan)))
    else:
        assert options.tolerance is not None
        outcomes = _by_tolerance(judge, costs, found, steps, original, options.tolerance)
        within = [o for o in outcomes if search.increase(o.loss, original) <= options.tolerance]
        taken = min(within, key=lambda o: (costs.total(o.plan), o.loss))
        walk = outcomes[0].k + 1, abs(outcomes[0].k - len(keys) // 2) + 1
    return Searched(
        costs, original, uniform, found, options.importance, outcomes, taken.name, len(judge.asked), judge.resumed, walk
    ), frequency  # fmt: skip


def _by_output(judge: Judge, costs: Costs) -> Importance:
    """The loss of a whole layer at 2 and at 8 bits is measured, and spread over its experts by what each adds to the error of
    the layer's output: 2 losses a layer and one pass, instead of 2 losses an expert."""
    layers = list(dict.fromkeys(layer for layer, _ in costs.keys))
    judge.stage("importance of each expert", 2 * len(layers) + 1)
    errors = judge.measure.output_errors(BITS)
    base = costs.uniform(search.MIDDLE)
    at_base = judge.loss(base)
    harm: dict[Key, float] = {}
    helped: dict[Key, float] = {}
    for layer in layers:
        own = [k for k in costs.keys if k[0] == layer]
        low = judge.loss(base | dict.fromkeys(own, search.LOW)) - at_base
        high = at_base - judge.loss(base | dict.fromkeys(own, search.HIGH))
        harm |= spread({k: errors[k][search.LOW] - errors[k][search.MIDDLE] for k in own}, low)
        helped |= spread({k: errors[k][search.MIDDLE] - errors[k][search.HIGH] for k in own}, high)
    return Importance(harm, helped, 2 * len(layers) + 2)


def spread(values: Mapping[Key, float], total: float) -> dict[Key, float]:
    """A total in proportion to values; neither counts below zero."""
    whole = sum(max(v, 0.0) for v in values.values())
    return {k: max(v, 0.0) / whole * max(total, 0.0) if whole > 0 else 0.0 for k, v in values.items()}


def _by_size(judge: Judge, costs: Costs, steps: Steps, budget: int) -> list[Outcome]:
    """The assignment of three widths, beside the widest uniform one that fits."""
    plan = search.under_budget(costs, steps, budget)
    out = [Outcome("widths", plan, judge.loss(plan), evaluations=1)]
    fits = [b for b in BITS if costs.total(costs.uniform(b)) <= budget]
    even = costs.uniform(fits[-1])
    return [*out, Outcome(f"all at {fits[-1]} bits", even, judge.loss(even))]


def _by_tolerance(
    judge: Judge, costs: Costs, found: Importance, steps: Steps, original: float, tolerance: float
) -> list[Outcome]:
    lo, hi = search.bracket(judge, costs, original, tolerance)
    out = []
    for name, order in search.orders(costs, found, lo, hi).items():
        most = len(order) if lo != hi else 0
        out.append(search.chosen(judge, name, search.split(order, lo, hi), most, original, tolerance))
    top = len(steps)
    return [*out, search.chosen(judge, "widths", lambda k: search.climbed(costs, steps, top - k), top, original, tolerance)]
