"""A policy over a recorded routing, without a model: the cache that the pager runs, fed from a file.

    replay(trace, sizes, budget, "lru")       Outcome: hit rate, bytes, evictions
    belady(trace, sizes, budget)              the same for the furthest-next-use rule, which knows the future
    tune(trace, sizes, budget)                weights of `value` for this routing

Belady's rule evicts what is needed furthest from now. It is optimal where all records have one size. Where bits differ it
stays the usual greedy bound, not a proof: the optimum for unequal sizes is NP-hard. Every miss must be read and kept, as in
the pager, so bypassing is not among the rule's freedoms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge.experts.cache import Cache
from edge.experts.policies import F64, I64, POLICIES, Policy, ValueWeights, make_policy
from edge.experts.trace import Trace
from refold.errors import UsageError

__all__ = ["BELADY", "Outcome", "belady", "compare", "replay", "tune"]

BELADY = "belady"


@dataclass(frozen=True)
class Outcome:
    """Of one replay.

    Attributes:
        asked: experts asked for, after `skip` tokens. hits: of these, in memory before their layer asked.
        bytes_read: of the misses. tokens: that were counted.
    """

    policy: str
    budget: int
    tokens: int
    asked: int
    hits: int
    bytes_read: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.asked if self.asked else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / self.tokens if self.tokens else 0.0


def replay(
    trace: Trace,
    sizes: I64,
    budget: int,
    policy: str | Policy = "value",
    *,
    frequency: F64 | None = None,
    weights: ValueWeights | Mapping[str, float] | None = None,
    pinned: Sequence[int] = (),
    skip: int = 0,
) -> Outcome:
    """Runs a policy.

    Args:
        sizes: int64 (count,), bytes each record takes in memory.
        skip: tokens at the beginning that fill the cache and are not counted.

    Raises:
        UsageError: unknown policy, or a layer's request is larger than the budget.
    """
    chosen = make_policy(policy, trace.layout, frequency, weights) if isinstance(policy, str) else policy
    return _run(trace, Cache(sizes, budget, chosen, pinned), chosen.name, skip)


def belady(trace: Trace, sizes: I64, budget: int, *, skip: int = 0) -> Outcome:
    """Runs the rule that evicts what is asked for furthest from now. Raises as `replay`."""
    return _run(trace, Cache(sizes, budget, _Clairvoyant(trace)), BELADY, skip)


def _run(trace: Trace, cache: Cache, name: str, skip: int) -> Outcome:
    asked = hits = read = 0
    last = 0
    for t, position, ids in trace.requests():
        while last < t:
            cache.policy.token()
            last += 1
        ids = np.unique(ids)
        there = cache.present[ids]
        missing = ids[~there]
        if t >= skip:
            asked, hits = asked + len(ids), hits + int(there.sum())
            read += int(cache.sizes[missing].sum())
        cache.policy.used(ids)
        keep = ids.tolist()
        if len(missing):
            need = int(cache.sizes[missing].sum())
            if cache.make_room(need, position, keep) is None:
                _in_pieces(cache, missing.tolist(), position)
            else:
                for i in missing.tolist():
                    cache.add(i)
    return Outcome(name, cache.budget, max(len(trace) - skip, 0), asked, hits, read)


def _in_pieces(cache: Cache, missing: list[int], position: int) -> None:
    """A union that is larger than the budget, as `Pager.waves` serves it."""
    for i in missing:
        if cache.make_room(int(cache.sizes[i]), position) is None:
            raise UsageError(f"{cache.budget:,} bytes do not hold one record of {int(cache.sizes[i]):,}.", code="budget")
        cache.add(i)


class _Clairvoyant(Policy):
    """Worth: minus the time of the next request, known from the trace."""

    name = BELADY

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.layout, np.zeros(trace.layout.count))
        never = np.iinfo(np.int64).max // 2
        self._next: I64 = np.full(trace.layout.count, never, np.int64)
        requests = [np.unique(ids) for _, _, ids in trace.requests()]
        self._after: list[I64] = []
        for time in range(len(requests) - 1, -1, -1):
            self._after.append(self._next[requests[time]].copy())
            self._next[requests[time]] = time
        self._after.reverse()

    def used(self, ids: I64) -> None:
        self._next[ids] = self._after[self.clock]
        self.clock += 1

    def worth(self, position: int) -> F64:
        return -self._next.astype(np.float64)


def compare(
    trace: Trace,
    sizes: I64,
    budget: int,
    *,
    frequency: F64 | None = None,
    weights: ValueWeights | None = None,
    skip: int = 0,
    policies: Sequence[str] = tuple(POLICIES),
    step: Callable[[], None] = lambda: None,
) -> dict[str, Outcome]:
    """Every policy and Belady, by name. `step` is called after each."""
    out = {}
    for name in policies:
        out[name] = replay(trace, sizes, budget, name, frequency=frequency, weights=weights, skip=skip)
        step()
    out[BELADY] = belady(trace, sizes, budget, skip=skip)
    step()
    return out


GRID: Mapping[str, Sequence[float]] = {
    "recency": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    "distance": (0.0, 0.05, 0.1, 0.2, 0.4, 0.8),
    "fade": (1.0, 2.0, 4.0, 8.0, 16.0),
    "memory": (8.0, 32.0, 128.0, 512.0),
}


def tune(
    trace: Trace,
    sizes: I64,
    budget: int,
    *,
    frequency: F64 | None = None,
    start: ValueWeights | None = None,
    rounds: int = 2,
    step: Callable[[], None] = lambda: None,
) -> ValueWeights:
    """Weights of `value` with the fewest bytes read, by coordinate search; frequency's is 1, as only ratios matter.

    Args:
        step: called after each of at most rounds * 21 replays.
    """
    best = start or ValueWeights()
    skip = len(trace) // 8

    def cost(weights: ValueWeights) -> int:
        outcome = replay(trace, sizes, budget, "value", frequency=frequency, weights=weights, skip=skip)
        step()
        return outcome.bytes_read

    least = cost(best)
    for _ in range(rounds):
        before = least
        for name, values in GRID.items():
            for value in values:
                if value == getattr(best, name):
                    continue
                tried = replace(best, **{name: value})
                told = cost(tried)
                if told < least:
                    best, least = tried, told
        if least == before:
            break
    return best
