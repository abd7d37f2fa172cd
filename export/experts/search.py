"""Which expert gets how many bits: EdgeMoE's bracket search (arXiv 2308.14352 §4.1), its order by what a token reads, and an
assignment of three widths under a budget. Pure: a loss is asked of a `Judge`, everything else is arithmetic.

    importance    loss with one expert at 2 bits and all others at 4, less the loss with all at 4 (EdgeMoE); also one at 8
    bracket       hi: the fewest bits at which all experts together stay within the tolerance; lo: the next fewer.
                  The first K of an order go to lo, the others to hi; the largest K within the tolerance, by halving,
                  so that K and K + 1 are both measured
    edgemoe       orders by importance alone, least first
    reads         orders by bytes that a token then reads less, for each loss: (frequency x saving) / importance, most first
    widths        starts with all at 2 bits and spends bytes where each takes most loss away, on every expert's convex hull
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from refold.errors import ModelError, UsageError
from refold.experts import BITS

__all__ = ["Costs", "Importance", "Judge", "Outcome", "bracket", "chosen", "importance", "ladder", "plan_key", "under_budget"]

Key = tuple[int, int]
Plan = Mapping[Key, int]
LOW, MIDDLE, HIGH = BITS


@dataclass(frozen=True)
class Costs:
    """Of the experts of one model. keys: in the records' order. size: bytes of a record, by bits. frequency: share of a layer's
    tokens that use the expert.
    """

    keys: Sequence[Key]
    size: Mapping[int, int]
    frequency: Mapping[Key, float]

    def uniform(self, bits: int) -> dict[Key, int]:
        return dict.fromkeys(self.keys, bits)

    def total(self, plan: Plan) -> int:
        """Bytes of all records."""
        return sum(self.size[plan[k]] for k in self.keys)

    def reads(self, plan: Plan) -> float:
        """Bytes that a token reads when nothing is cached."""
        return sum(self.size[plan[k]] * self.frequency.get(k, 0.0) for k in self.keys)


def plan_key(plan: Plan, context: str) -> str:
    """Name of a measurement. context: what else it depends on."""
    rows = sorted((*k, b) for k, b in plan.items())
    return hashlib.sha256(json.dumps([context, rows]).encode()).hexdigest()


class Judge:
    """Measures plans, each once, and counts. known: what an earlier run has measured. note: keeps a measurement."""

    def __init__(
        self,
        measure: Callable[[Plan], float],
        context: str = "",
        known: Mapping[str, float] | None = None,
        note: Callable[[str, float], None] = lambda _key, _loss: None,
    ) -> None:
        self._measure, self._context, self._note = measure, context, note
        self._known = dict(known or {})
        self.asked: set[str] = set()
        self.fresh = 0

    def loss(self, plan: Plan) -> float:
        key = plan_key(plan, self._context)
        self.asked.add(key)
        if key not in self._known:
            self._known[key] = self._measure(plan)
            self.fresh += 1
            self._note(key, self._known[key])
        return self._known[key]


@dataclass(frozen=True)
class Importance:
    """harm: loss that an expert adds at 2 bits instead of 4. help: loss that it takes away at 8 instead of 4. Neither below 0:
    what is, is noise. evaluations: how many losses were needed.
    """

    harm: Mapping[Key, float]
    help: Mapping[Key, float]
    evaluations: int = 0


@dataclass(frozen=True)
class Outcome:
    """One procedure's answer.

    Attributes:
        k: experts at the lower width, or steps taken up from 2 bits. moved: values of K that were measured, in order.
        evaluations: losses asked for, without those of importance, and of all experts at one width.
    """

    name: str
    plan: Plan
    loss: float
    k: int = 0
    moved: Sequence[int] = field(default_factory=tuple)
    evaluations: int = 0


def importance(judge: Judge, costs: Costs, used: Callable[[Key], bool], step: Callable[[], None] = lambda: None) -> Importance:
    """EdgeMoE's, and the same upwards. An expert that no token uses is left out: its loss cannot differ."""
    base = costs.uniform(MIDDLE)
    at_base = judge.loss(base)
    harm, helped, asked = {}, {}, 1
    for key in costs.keys:
        if used(key):
            harm[key] = max(judge.loss(base | {key: LOW}) - at_base, 0.0)
            step()
            helped[key] = max(at_base - judge.loss(base | {key: HIGH}), 0.0)
            step()
            asked += 2
        else:
            harm[key] = helped[key] = 0.0
    return Importance(harm, helped, asked)


def increase(loss: float, original: float) -> float:
    """Of perplexity, as a share."""
    return math.expm1(loss - original)


def bracket(judge: Judge, costs: Costs, original: float, tolerance: float) -> tuple[int, int]:
    """(lo, hi) bits; equal where all experts at 2 bits are within the tolerance.

    Raises:
        ModelError: not even 8 bits are.
    """
    for bits in BITS:
        if increase(judge.loss(costs.uniform(bits)), original) <= tolerance:
            below = [b for b in BITS if b < bits]
            return (below[-1] if below else bits), bits
    at_high = increase(judge.loss(costs.uniform(HIGH)), original)
    raise ModelError(
        f"At 8 bits perplexity rises by {at_high:.2%} already, more than the {tolerance:.2%} asked for: raise "
        "--max-perplexity-increase or make --group smaller.",
        code="tolerance",
    )


def orders(costs: Costs, found: Importance, lo: int, hi: int) -> dict[str, list[Key]]:
    """EdgeMoE's order and the one by reads, first to be lowered first. Between 4 and 8 bits the loss that counts is `help`."""
    loss = found.harm if hi == MIDDLE else found.help
    saving = costs.size[hi] - costs.size[lo]

    def by_reads(key: Key) -> float:
        saved = costs.frequency.get(key, 0.0) * saving
        return -saved / loss[key] if loss[key] > 0 else -math.inf

    return {
        "edgemoe": sorted(costs.keys, key=lambda k: (found.harm[k], costs.frequency.get(k, 0.0), k)),
        "reads": sorted(costs.keys, key=lambda k: (by_reads(k), costs.frequency.get(k, 0.0), k)),
    }


def chosen(
    judge: Judge, name: str, plan_of: Callable[[int], dict[Key, int]], most: int, original: float, tolerance: float
) -> Outcome:
    """The largest K from 0 to `most` within the tolerance, where plan_of(0) is. K + 1 was measured not to be, or K is `most`.

    Loss is not strictly monotone in K, so this is a largest K whose successor fails, not always the largest of all.
    """
    moved: list[int] = []
    good, bad = 0, most + 1
    probe = most
    while bad - good > 1:
        moved.append(probe)
        if increase(judge.loss(plan_of(probe)), original) <= tolerance:
            good = probe
        else:
            bad = probe
        probe = (good + bad) // 2
    plan = plan_of(good)
    return Outcome(name, plan, judge.loss(plan), good, tuple(moved), sum(k < most for k in moved))


def split(order: Sequence[Key], lo: int, hi: int) -> Callable[[int], dict[Key, int]]:
    """K to plan: the first K of the order at lo, the others at hi."""
    return lambda k: {key: lo if i < k else hi for i, key in enumerate(order)}


def ladder(costs: Costs, found: Importance) -> list[tuple[Key, int]]:
    """(expert, its new bits), most loss taken away for each byte first; an expert's steps come in order."""
    first, second = costs.size[MIDDLE] - costs.size[LOW], costs.size[HIGH] - costs.size[MIDDLE]
    steps: list[tuple[float, int, Key, int]] = []
    for n, key in enumerate(costs.keys):
        up = found.harm[key] / first if first else math.inf  # small records may be as long at two widths: then it is free
        on = found.help[key] / second if second else math.inf
        if on > up:  # not convex: go to 8 in one step
            both = (found.harm[key] + found.help[key]) / (first + second) if first + second else math.inf
            steps.append((-both, n, key, HIGH))
        else:
            steps += [(-up, n, key, MIDDLE), (-on, n, key, HIGH)]
    return [(key, bits) for _, _, key, bits in sorted(steps, key=lambda s: (s[0], s[3], s[1]))]


def climbed(costs: Costs, steps: Sequence[tuple[Key, int]], k: int) -> dict[Key, int]:
    """All at 2 bits, then the first k steps."""
    return costs.uniform(LOW) | dict(steps[:k])


def under_budget(costs: Costs, steps: Sequence[tuple[Key, int]], budget: int) -> dict[Key, int]:
    """Steps in order as long as bytes last; one that no longer fits is left out, with what follows it for the same expert.

    Raises:
        UsageError: not even 2 bits fit.
    """
    plan = costs.uniform(LOW)
    left = budget - costs.total(plan)
    if left < 0:
        raise UsageError(f"The experts take {costs.total(plan):,} bytes at 2 bits; --size is {budget:,}.", code="budget")
    stuck: set[Key] = set()
    for key, bits in steps:
        price = costs.size[bits] - costs.size[plan[key]]
        if key not in stuck and price <= left:
            plan[key], left = bits, left - price
        else:
            stuck.add(key)
    return plan
