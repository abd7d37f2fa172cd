"""The path table and the choice of guesses: what follows what is found out, kept, and believed only while it comes true."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from expert_files import BASE, expected, make_index
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.experts.faulty import FaultyFile
from edge.experts.pager import Pager, PagerSettings
from edge.experts.paths import PathTable
from edge.experts.policies import Layout
from edge.experts.predict import ReadAhead
from refold.errors import UsageError
from refold.experts import ExpertIndex, Geometry, Record


def bare_index(layers=(0, 1, 2), experts=6, top_k=1):
    g = Geometry("mixtral", layers, experts, top_k, 32, 32, True, "silu", 32)
    records = {
        (p, e): Record(p, e, 4, 4096 * (i * experts + e), 4096, "") for i, p in enumerate(layers) for e in range(experts)
    }
    return ExpertIndex(g, records)


def teach(table, tokens):
    for token in tokens:
        for position, experts in enumerate(token):
            table.learn(position, np.array(experts, np.int64))


def test_order_two_tells_apart_what_order_one_cannot():
    """Layer 2 uses (layer 0 + layer 1) mod 6: its expert of layer 1 alone says nothing."""
    rng = np.random.default_rng(0)
    tokens = [[[a], [b], [(a + b) % 6]] for a, b in rng.integers(0, 6, (600, 2))]
    found = {}
    for order in (1, 2):
        table = PathTable(None, bare_index(), order=order)
        teach(table, tokens)
        right = 0
        for a in range(6):
            for b in range(6):
                table.learn(0, np.array([a]))
                table.learn(1, np.array([b]))
                best, chance = table.predict(2)
                right += int(best[0]) == (a + b) % 6
                assert (np.diff(chance) <= 0).all() and len(best) == 2
        found[order] = right
    assert found[2] == 36 and found[1] < 15


def test_layer_0_follows_the_last_layers_of_the_token_before():
    tokens = [[[t % 6], [(t + 1) % 6], [(t + 2) % 6]] for t in range(60)]
    table = PathTable(None, bare_index())
    teach(table, tokens)
    best, chance = table.predict(0)
    assert int(best[0]) == 60 % 6 and chance[0] > 0.5


def test_sets_are_taken_apart():
    index = bare_index(experts=8, top_k=2)
    rng = np.random.default_rng(0)
    tokens = []
    for _ in range(300):
        a = rng.choice(8, 2, replace=False)
        tokens.append([a, (a + 3) % 8, (a + 5) % 8])
    table = PathTable(None, index)
    teach(table, tokens)
    table.learn(0, np.array([1, 6]))
    best, _ = table.predict(1)
    assert sorted(best[:2].tolist()) == [1, 4]


def test_prefill_breaks_the_path_and_nothing_known_says_nothing():
    table = PathTable(None, bare_index())
    assert table.predict(0) is None
    teach(table, [[[0], [1], [2]]] * 3)
    assert table.predict(0) is not None
    table.learn(0, np.array([0, 1, 2, 3]))
    assert table.predict(1) is None


@settings(max_examples=25)
@given(
    st.lists(st.tuples(*[st.sets(st.integers(0, 5), min_size=1, max_size=2)] * 3), min_size=2, max_size=12),
    st.sampled_from([1, 2]),
)
def test_chances_are_chances_and_keeping_changes_none(tokens, order):
    index = bare_index(top_k=2)
    table = PathTable(None, index, order=order)
    teach(table, [[sorted(s) for s in t] for t in tokens])
    again = PathTable(None, index, order=order)
    with np.load(io.BytesIO(table.dump())) as f:
        again._take(f)
    again._before = table._before
    for position in range(3):
        told, kept = table.predict(position), again.predict(position)
        if told is not None:
            assert (told[1] >= 0).all() and (told[1] <= 1 + 1e-9).all()
            assert np.array_equal(told[0], kept[0]) and np.array_equal(told[1], kept[1])


def test_counts_are_halved_before_they_overflow(monkeypatch):
    monkeypatch.setattr("edge.experts.paths.FULL", 100)
    table = PathTable(None, bare_index())
    teach(table, [[[0], [1], [2]]] * 500)
    assert int(table._one.max()) <= 100 and int(table._two.max()) <= 100
    table.learn(0, np.array([0]))
    table.learn(1, np.array([1]))
    assert int(table.predict(2)[0][0]) == 2


@pytest.mark.parametrize("damage", ["garbage", "other model", "misshapen"])
def test_a_table_that_cannot_be_used_is_learnt_anew_and_said(tmp_path, caplog, damage):
    file = tmp_path / "t.npz"
    table = PathTable(file, bare_index())
    teach(table, [[[0], [1], [2]]] * 5)
    table.write(table.dump())
    index = bare_index()
    if damage == "garbage":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "other model":
        index = bare_index(experts=7)
    else:
        np.savez(file, key=np.array(table.key), one=np.zeros(3), zero=np.zeros(3), keys=np.zeros(1), two=np.zeros(1))
    with caplog.at_level("WARNING"):
        fresh = PathTable.load(file, index)
    assert fresh.predict(0) is None and "learnt anew" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    table = PathTable(tmp_path / "file" / "t.npz", bare_index())
    with caplog.at_level("WARNING"):
        table.save_or_warn()
    assert "not kept" in caplog.text


# What is worth a read


def test_a_claim_is_believed_until_it_was_tried():
    ahead = ReadAhead(Layout((0, 1), 8), 2, 1, 0.5)
    assert ahead.choose(1, [8, 9, 10], [0.9, 0.55, 0.2]) == [8, 9]
    for _ in range(30):
        ahead.choose(1, [8, 9, 10], [0.9, 0.55, 0.2])
        ahead.asked(1, {10})
    assert ahead.choose(1, [8, 9, 10], [0.9, 0.55, 0.2]) == [10]
    assert ahead.choose(0, [0], [0.9]) == [0]  # another layer's guesses are others


def test_ranks_that_do_not_come_true_are_not_read():
    ahead = ReadAhead(Layout((0, 1), 8), 2, 1, 0.4)
    assert len(ahead.choose(1, [8, 9, 10, 11])) == 3
    for _ in range(30):
        ahead.choose(1, [8, 9, 10, 11])
        ahead.asked(1, {8, 9})
    assert ahead.choose(1, [12, 13, 14, 15]) == [12, 13]


def test_paths_read_ahead_layer_0_of_the_next_token_and_are_silent_where_hints_come():
    index, content = make_index(hidden=256, intermediate=64)
    with Pager(Path("m"), index, BASE, 8 * index.largest, PagerSettings(paths="off", warm=False), FaultyFile(content)) as pager:
        for t in range(60):
            for layer in range(3):
                wanted = [(t + layer) % 8, (t + layer + 4) % 8]
                if layer:
                    pager.hint(layer, wanted)
                with pager.use(layer, wanted) as records:
                    assert records[0].tobytes() == expected(content, index, layer, wanted[0])
            pager.token()
        c = pager.counters
        assert c.covered > 40 and c.ahead_useful == c.covered
        assert pager.ahead.hints_come(1, 60) and not pager.ahead.hints_come(0, 60)


def test_without_read_ahead_nothing_is_read_that_nobody_asked_for():
    index, content = make_index(hidden=256, intermediate=64)
    settings = PagerSettings(paths="off", warm=False, ahead=False)
    with Pager(Path("m"), index, BASE, 8 * index.largest, settings, FaultyFile(content)) as pager:
        for _ in range(5):
            pager.hint(1, [1, 2])
            with pager.use(0, [0, 1]):
                pass
            pager.token()
        assert pager.counters.bytes_read == 2 * index.largest and pager.counters.ahead_bytes == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "x"},
        {"verify": "x"},
        {"threads": 0},
        {"block": 1000},
        {"path_order": 3},
        {"pin": 1.5},
        {"threshold": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        PagerSettings(**wrong)
