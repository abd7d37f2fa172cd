"""The search is arithmetic: proved on losses that are known."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.experts.search import (
    Costs,
    Importance,
    Judge,
    bracket,
    chosen,
    climbed,
    importance,
    increase,
    ladder,
    orders,
    plan_key,
    split,
    under_budget,
)
from refold.errors import ModelError, UsageError

SIZE = {2: 5, 4: 8, 8: 15}
SOME = st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.02), st.floats(0, 1)), min_size=1, max_size=7)


def world(rows):
    """Experts whose losses add up: what each loses at 2 and at 4 bits against 8, and how often it is used."""
    keys = [(0, i) for i in range(len(rows))]
    lost = {k: {2: a + b, 4: b, 8: 0.0} for k, (a, b, _) in zip(keys, rows, strict=True)}
    costs = Costs(keys, SIZE, {k: f for k, (_, _, f) in zip(keys, rows, strict=True)})
    return costs, lambda plan: 1.0 + sum(lost[k][plan[k]] for k in keys)


@given(SOME)
def test_importance_is_the_loss_of_one_expert_alone(rows):
    costs, loss = world(rows)
    found = importance(Judge(loss), costs, lambda k: k[1] != 0)
    for i, (a, b, _) in enumerate(rows):
        assert found.harm[0, i] == pytest.approx(a if i else 0.0, abs=1e-9)
        assert found.help[0, i] == pytest.approx(b if i else 0.0, abs=1e-9)
    assert found.evaluations == 2 * len(rows) - 1


@given(SOME, st.floats(0.001, 0.5))
def test_the_bracket_holds_the_tolerance(rows, tolerance):
    costs, loss = world(rows)
    judge = Judge(loss)
    lo, hi = bracket(judge, costs, 1.0, tolerance)
    assert increase(loss(costs.uniform(hi)), 1.0) <= tolerance
    assert lo == hi == 2 or increase(loss(costs.uniform(lo)), 1.0) > tolerance


def test_a_tolerance_that_8_bits_miss_is_said():
    costs, _ = world([(0, 0, 0)])
    with pytest.raises(ModelError, match=r"At 8 bits perplexity rises by 10\.52%"):
        bracket(Judge(lambda plan: 1.1), costs, 1.0, 0.01)


@given(SOME, st.floats(0.001, 0.2))
def test_k_is_within_the_tolerance_and_the_next_is_not(rows, tolerance):
    costs, loss = world(rows)
    judge = Judge(loss)
    found = importance(judge, costs, lambda _: True)
    lo, hi = bracket(judge, costs, 1.0, tolerance)
    for name, order in orders(costs, found, lo, hi).items():
        assert sorted(order) == sorted(costs.keys)
        plan_of = split(order, lo, hi)
        got = chosen(judge, name, plan_of, len(order), 1.0, tolerance)
        assert increase(loss(got.plan), 1.0) <= tolerance and got.loss == loss(got.plan)
        assert got.k == len(order) or increase(loss(plan_of(got.k + 1)), 1.0) > tolerance
        assert len(got.moved) <= math.ceil(math.log2(len(order) + 1)) + 1
        assert got.k == len(order) or got.k + 1 in got.moved  # measured, not supposed


def test_orders_are_the_papers_and_the_one_by_reads():
    costs, loss = world([(0.05, 0, 0.9), (0.01, 0, 0.1), (0.02, 0, 0.5), (0.0, 0, 0.0)])
    found = importance(Judge(loss), costs, lambda _: True)
    both = orders(costs, found, 2, 4)
    assert [e for _, e in both["edgemoe"]] == [3, 1, 2, 0]
    assert [e for _, e in both["reads"]] == [3, 2, 0, 1]  # 25 and 18 uses a loss before 10


@given(SOME, st.integers(0, 120))
def test_a_budget_is_kept(rows, budget):
    costs, loss = world(rows)
    found = importance(Judge(loss), costs, lambda _: True)
    try:
        plan = under_budget(costs, ladder(costs, found), budget)
    except UsageError:
        assert budget < costs.total(costs.uniform(2))
        return
    assert costs.total(plan) <= budget and set(plan) == set(costs.keys)


@given(SOME)
def test_the_ladder_is_optimal_at_each_of_its_rungs(rows):
    """Against every assignment of the same bytes or fewer: each prefix of the steps has the least loss."""
    rows = rows[:5]
    costs, loss = world(rows)
    steps = ladder(costs, importance(Judge(loss), costs, lambda _: True))
    every = [dict(zip(costs.keys, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=len(rows))]
    for k in range(len(steps) + 1):
        plan = climbed(costs, steps, k)
        best = min(loss(p) for p in every if costs.total(p) <= costs.total(plan))
        assert loss(plan) <= best + 1e-9


def test_widths_of_equal_length_are_free():
    costs = Costs([(0, 0), (0, 1)], {2: 4, 4: 4, 8: 8}, {})
    found = Importance({(0, 0): 0.0, (0, 1): 0.1}, {(0, 0): 0.1, (0, 1): 0.0})
    assert under_budget(costs, ladder(costs, found), 8) == {(0, 0): 4, (0, 1): 4}
    same = Costs([(0, 0)], {2: 4, 4: 4, 8: 4}, {})
    assert under_budget(same, ladder(same, found_of(same)), 4) == {(0, 0): 8}


def found_of(costs):
    return Importance(dict.fromkeys(costs.keys, 0.0), dict.fromkeys(costs.keys, 0.0))


def test_a_measurement_is_made_once_and_kept():
    kept, calls = {}, []
    costs, loss = world([(0.1, 0.1, 1.0)] * 3)

    def measure(plan):
        calls.append(plan)
        return loss(plan)

    judge = Judge(measure, "text", {}, kept.__setitem__)
    first = [judge.loss(costs.uniform(b)) for b in (2, 4, 2)]
    again = Judge(measure, "text", kept)
    assert [again.loss(costs.uniform(b)) for b in (2, 4, 2)] == first
    assert len(calls) == 2 and (judge.fresh, again.fresh, len(again.asked)) == (2, 0, 2)
    assert plan_key(costs.uniform(2), "text") != plan_key(costs.uniform(2), "other")


def test_noise_is_no_gain():
    costs, _ = world([(0, 0, 1.0)])
    found = importance(Judge(lambda plan: 2.0 if plan == {(0, 0): 4} else 1.0), costs, lambda _: True)
    assert found == Importance({(0, 0): 0.0}, {(0, 0): 1.0}, 3)
