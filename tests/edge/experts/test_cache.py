"""The cache's promises, whatever the order of events, and its hits against a naive model's."""

from __future__ import annotations

import numpy as np
import pytest
from expert_files import make_index
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.experts.buffers import Buffers, stride
from edge.experts.cache import Cache, check_budget, floor, hottest
from edge.experts.policies import POLICIES, Layout, ValueWeights, make_policy
from edge.experts.replay import belady, replay
from edge.experts.trace import Trace
from refold.errors import UsageError

LAYERS, EXPERTS, TOP = 3, 5, 2
COUNT = LAYERS * EXPERTS


def routing(draw_tokens):
    return Trace(
        tuple(range(LAYERS)),
        EXPERTS,
        TOP,
        [[(p, np.array(sorted(e), np.int64)) for p, e in enumerate(token)] for token in draw_tokens],
    )


TOKENS = st.lists(
    st.tuples(*[st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=TOP) for _ in range(LAYERS)]), min_size=1, max_size=25
)


@given(
    st.sampled_from(list(POLICIES)),
    st.lists(st.integers(1, 4), min_size=COUNT, max_size=COUNT),
    st.integers(12, 60),
    st.sets(st.integers(0, COUNT - 1), max_size=2),
    st.lists(
        st.tuples(st.integers(0, COUNT - 1), st.sampled_from(["hold", "release", "ask", "coming", "came", "token"])),
        max_size=80,
    ),
)
def test_budget_pins_and_holds_are_kept_whatever_happens(name, sizes, budget, pinned, events):
    policy = make_policy(name, Layout((0, 1, 2), EXPERTS))
    sizes = np.array(sizes, np.int64)
    cache = Cache(sizes, budget, policy, pinned)
    held = []
    for number, event in events:
        before = cache.present.copy()
        kept = before & (cache.pinned | cache.coming | (cache.held > 0))
        if event == "ask" or event == "coming":
            policy.used(np.array([number]))
            if not cache.present[number]:
                free = budget - int(sizes[before].sum())
                may = int(sizes[before & ~kept].sum())
                gone = cache.make_room(int(sizes[number]), number // EXPERTS)
                assert (gone is None) == (free + may < sizes[number])
                if gone is None:
                    assert (cache.present == before).all()
                else:
                    cache.add(number, coming=event == "coming")
        elif event == "came":
            cache.coming[number] = False
        elif event == "hold" and cache.present[number]:
            cache.held[number] += 1
            held.append(number)
        elif event == "release" and held:
            cache.held[held.pop()] -= 1
        elif event == "token":
            policy.token()
        assert cache.used == int(sizes[cache.present].sum()) <= budget
        assert (cache.present[kept]).all()


@given(TOKENS, st.integers(2, COUNT))
def test_hits_of_lru_are_a_naive_models(tokens, slots):
    trace = routing(tokens)
    asked = sum(len(ids) for _, _, ids in trace.requests())
    told = replay(trace, np.full(COUNT, 7, np.int64), slots * 7, "lru")
    assert (told.asked, told.bytes_read) == (asked, 7 * (asked - told.hits))
    assert told.hits == _lru_by_request(trace, slots)


def _lru_by_request(trace, slots):
    """The time of the last request decides; of one request, the number."""
    last, hits = {}, 0
    for time, (_, _, ids) in enumerate(trace.requests()):
        wanted = ids.tolist()
        hits += sum(i in last for i in wanted)
        missing = [i for i in wanted if i not in last]
        while len(last) + len(missing) > slots:
            victim = min((i for i in last if i not in wanted), key=lambda i: (last[i], i))
            del last[victim]
        for i in wanted:
            last[i] = time
    return hits


@settings(max_examples=60)
@given(TOKENS, st.integers(2, COUNT - 1))
def test_no_policy_beats_belady_where_records_are_equal(tokens, slots):
    trace, sizes = routing(tokens), np.full(COUNT, 4096, np.int64)
    best = belady(trace, sizes, slots * 4096)
    for name in POLICIES:
        assert replay(trace, sizes, slots * 4096, name).hits <= best.hits


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 3))
def test_belady_is_the_optimum_found_by_trying_everything(order, slots):
    trace = Trace((0,), 4, 1, [[(0, np.array([i]))] for i in order])

    def most(at, resident):
        if at == len(order):
            return 0
        i = order[at]
        if i in resident:
            return 1 + most(at + 1, resident)
        if len(resident) < slots:
            return most(at + 1, resident | {i})
        return max(most(at + 1, resident - {gone} | {i}) for gone in resident)

    assert belady(trace, np.full(4, 1, np.int64), slots).hits == most(0, frozenset())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=120), st.integers(1, 12))
def test_buffers_never_exceed_their_budget_and_never_overlap(events, pages):
    sizes = (4096, 3 * 4096, 5 * 4096)
    budget = pages * 4096 + 123
    buffers = Buffers(sizes, budget)
    out = []
    for number, (take, which) in enumerate(events):
        if take:
            if budget < sizes[which]:
                continue
            used = sum(s.size for s, _ in out)
            slot = buffers.take(sizes[which])
            assert (slot is None) == (used + sizes[which] > budget)
            if slot is not None:
                assert slot.memory.ctypes.data % 4096 == 0 and len(slot.memory) == sizes[which]
                slot.memory[:] = number % 256
                out.append((slot, number % 256))
        elif out:
            buffers.give_back(out.pop(which % len(out))[0])
        assert buffers.resident <= budget
        assert all((slot.memory == mark).all() for slot, mark in out)
    buffers.close()
    assert buffers.resident == 0


def test_distance_runs_in_circles_over_decoder_layers_and_once_over_an_encoders():
    away = Layout((-2, -1, 0, 1, 4), 2).distance()
    assert away[2:, 2:].tolist() == [[3, 1, 2], [2, 3, 1], [1, 2, 3]]
    assert away[0].tolist() == [6, 1, 2, 3, 4] and away[3, :2].tolist() == [6, 6]


def test_edgemoe_keeps_what_runs_soon_and_its_printed_form_what_ran_just_now():
    layout = Layout(tuple(range(6)), 1)
    often = np.full(6, 0.5)
    prose, printed = make_policy("edgemoe", layout, often), make_policy("edgemoe-printed", layout, often)
    assert prose.worth(2).tolist() == pytest.approx([0.5 / d for d in (4, 5, 6, 1, 2, 3)])
    assert int(prose.worth(2).argmax()) == 3
    assert printed.worth(2).tolist() == pytest.approx([0.5 / d for d in (2, 1, 6, 5, 4, 3)])
    assert int(printed.worth(2).argmax()) == 1


def test_learnt_finds_out_whether_recency_or_frequency_tells():
    """Alternating use rewards what was not used last; the fixed weights of `value` believe the opposite."""
    tokens = [[(0, np.array([t % 2, 2 + t % 7 // 3]))] for t in range(400)]
    trace = Trace((0,), 8, 2, tokens)
    sizes = np.ones(8, np.int64)
    policy = make_policy("learnt", trace.layout)
    told = replay(trace, sizes, 4, policy, skip=200)
    assert told.hits > replay(trace, sizes, 4, "lru", skip=200).hits
    assert policy.worth(0)[:2].min() > policy.worth(0)[5:].max()


def test_the_floor_is_the_largest_top_k_and_one_in_flight():
    index, _ = make_index(bits={(1, 0): 8, (1, 1): 8, (2, 3): 2})
    sizes = sorted((index[1, e].size for e in range(8)), reverse=True)
    assert floor(index) == sizes[0] + sizes[1] + index.largest
    with pytest.raises(UsageError, match=f"{floor(index):,}"):
        check_budget(index, floor(index) - 1, floor(index), "m.refold")
    check_budget(index, floor(index), floor(index), "m.refold")


def test_the_hottest_are_those_above_a_share_as_far_as_bytes_go():
    often, sizes = np.array([0.1, 0.9, 0.6, 0.8, 0.5]), np.array([1, 4, 4, 4, 4])
    assert hottest(often, sizes, 100, 0.5) == [1, 3, 2]
    assert hottest(often, sizes, 8, 0.5) == [1, 3]
    assert hottest(often, sizes, 0, 0.5) == []


def test_unknown_policies_and_weights_are_said():
    layout = Layout((0,), 2)
    with pytest.raises(UsageError, match="lru"):
        make_policy("mru", layout)
    with pytest.raises(UsageError, match="recency"):
        make_policy("value", layout, None, {"recent": 1.0})
    with pytest.raises(UsageError, match="fade"):
        ValueWeights(fade=0)


def test_memory_of_a_record_is_whole_pages():
    assert stride(1) == stride(4096) or stride(4096) > 4096
    assert stride(4097) % 4096 == 0
