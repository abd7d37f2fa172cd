"""Predictor and search: a known function is learned, no budget is ever exceeded, what cannot be met is told."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elastic_space import LAYOUT

from export.elastic.cli_search import parse_amount
from export.elastic.genome import Genome, GenomeSampler
from export.elastic.latency import _by_layer
from export.elastic.pairs import measured_pairs
from export.elastic.predictor import Predictor, encode, kendall, pearson, spearman
from export.elastic.process import NoiseProcess
from export.elastic.search import Budget, Evolution, least, search
from export.elastic.space import Form, Space, bit_operations, byte_count
from refold.errors import UsageError

SPACE = Space()
LEAST = least(SPACE, LAYOUT, SPACE.forms(), Budget("bytes", lambda c: byte_count(LAYOUT, c), 0))[0]
MOST = byte_count(LAYOUT, SPACE.uniform(LAYOUT, 8, 8, Form(True, False, False)))


def truth(g: Genome) -> float:
    """Layer b matters thrice as much as a, value f more than av; per channel helps; the last bits help least."""
    gain = [3 * math.sqrt(g.weight_bits[1] - 1), math.sqrt(g.weight_bits[0] - 1), 2 * math.sqrt(g.activation_bits[0] - 1)]
    return 0.5 + 0.03 * (sum(gain) + 0.2 * g.activation_bits[1] + (1.0 if g.form.per_channel else 0.0))


def predict(genomes):
    return np.asarray([truth(g) for g in genomes], np.float32)


@settings(max_examples=15)
@given(budget=st.integers(int(LEAST), MOST + 10), seed=st.integers(0, 99))
def test_no_budget_is_ever_exceeded(budget, seed):
    bytes_ = Budget("bytes", lambda c: byte_count(LAYOUT, c), budget)
    found = search(SPACE, LAYOUT, predict, [bytes_], Evolution(10, 3, seed=seed))
    assert found and len(set(found)) == len(found)
    for g in found:
        configuration = g.configuration(SPACE, LAYOUT)
        SPACE.check(LAYOUT, configuration)
        assert byte_count(LAYOUT, configuration) <= budget


def test_what_cannot_be_met_is_told_with_the_least_possible():
    bytes_ = Budget("bytes", lambda c: byte_count(LAYOUT, c), LEAST - 1, lambda v: f"{v:.0f} B")
    with pytest.raises(UsageError, match=f"the least possible is {LEAST:.0f} B") as e:
        search(SPACE, LAYOUT, predict, [bytes_])
    assert e.value.code == "budget"
    exact = search(SPACE, LAYOUT, predict, [Budget("bytes", bytes_.cost, LEAST)], Evolution(8, 1))
    assert {byte_count(LAYOUT, g.configuration(SPACE, LAYOUT)) for g in exact} == {LEAST}


def test_two_budgets_hold_at_once():
    like = SPACE.uniform(LAYOUT, 4, 4)
    budgets = [
        Budget(name, lambda c, cost=cost: cost(LAYOUT, c), cost(LAYOUT, like))
        for name, cost in (("bytes", byte_count), ("bit operations", bit_operations))
    ]
    found = search(SPACE, LAYOUT, predict, budgets, Evolution(40, 20))
    for g in found:
        assert all(b.cost(g.configuration(SPACE, LAYOUT)) <= b.most for b in budgets)
    # The search beats the uniform configuration it was given the costs of, and knows which layer matters.
    uniform = Genome(SPACE.form, (4, 4), (4, 4))
    assert truth(found[0]) > truth(uniform)
    assert found[0] == search(SPACE, LAYOUT, predict, budgets, Evolution(40, 20))[0]


def test_both_halves_of_every_condition_are_encoded():
    sizes = set()
    for form in SPACE.forms():
        code = encode(LAYOUT, Genome(form, (2, 8), (5, 2)))
        assert code.shape == (6 + 14 * 4,) and code[:6].sum() == 3  # asymmetric is 1 in its own place, not absence
        sizes.add(tuple(code[:6]))
        blocks = code[6:].reshape(8, 7)
        assert blocks.sum(1).tolist() == [0, 1, 1, 0, 0, 1, 1, 0]  # pinned places are zero
        assert blocks[1, 0] == blocks[2, 6] == blocks[5, 3] == blocks[6, 0] == 1
    assert len(sizes) == 8


def test_the_predictor_learns_a_function_of_the_configuration(monkeypatch):
    monkeypatch.setattr("export.elastic.predictor.FEWEST_UPDATES", 400)
    rng = np.random.default_rng(0)
    genomes = list({GenomeSampler(SPACE, LAYOUT).draw(rng) for _ in range(200)})
    predictor, quality = Predictor.judged(LAYOUT, genomes, [truth(g) for g in genomes])
    assert quality.pearson > 0.9 and quality.kendall > 0.75 and quality.pairs == round(0.2 * len(genomes))
    low, high = Genome(SPACE.form, (2, 2), (2, 2)), Genome(SPACE.form, (8, 8), (8, 8))
    assert predictor([high])[0] > predictor([low])[0] + 0.05


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40))
def test_correlations_are_those_of_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    a, b = zip(*pairs, strict=True)
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert math.isnan(kendall(a, b)) and math.isnan(pearson(a, b))
        return
    assert kendall(a, b) == pytest.approx(float(stats.kendalltau(a, b).statistic), abs=1e-9)
    assert spearman(a, b) == pytest.approx(float(stats.spearmanr(a, b).statistic), abs=1e-9)
    assert pearson(a, b) == pytest.approx(float(stats.pearsonr(a, b).statistic), abs=1e-9)


class CountingJudge:
    """Stands for a judge: the known function, and how often it was asked."""

    def __init__(self, net) -> None:
        self.supernet, self.asked = net, 0

    def accuracy(self, configuration) -> float:
        self.asked += 1
        return sum(w.bits for _, w in configuration.weights) / 100


def test_pairs_survive_a_kill_in_the_middle_of_a_line(fresh, tmp_path):
    path, judge = tmp_path / "pairs.jsonl", CountingJudge(fresh)
    pairs = measured_pairs(judge, 6, 0, path)
    assert judge.asked == 6 and len(path.read_text().splitlines()) == 6
    path.write_bytes(path.read_bytes()[:-20])
    again = measured_pairs(judge, 6, 0, path)
    assert judge.asked == 7 and again == pairs and len(path.read_text().splitlines()) == 6
    assert all(json.loads(line)["accuracy"] > 0 for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("60KB", "bytes", 60_000),
        ("2KiB", "bytes", 2048),
        ("400M", "operations", 4e8),
        ("1.5 ms", "time", 1.5),
        ("20us", "time", 0.02),
    ],
)
def test_amounts(text, kind, amount):
    assert parse_amount(text, kind) == pytest.approx(amount)


@pytest.mark.parametrize("text", ["", "KB", "60X", "-3KB", "0KB", "1e9KB"])
def test_wrong_amounts(text):
    with pytest.raises(UsageError):
        parse_amount(text, "bytes")


def test_kernel_times_go_to_their_layers():
    def event(name, dur):
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur}

    events = [event("a.conv", 10), event("a.conv", 30), event("a.conv_quant", 5), event("a.conv1_quant", 7), event("Add_3", 4)]
    events += [{"cat": "Session", "name": "x_kernel_time", "dur": 99}, {"cat": "Node", "name": "a.conv_fence_before", "dur": 9}]
    layers, other = _by_layer(events, ("a.conv", "a.conv1"), 1)
    assert layers == {"a.conv": pytest.approx(0.045), "a.conv1": pytest.approx(0.007)} and other == pytest.approx(0.004)


def test_a_hundred_pairs_teach_the_process_what_bits_cost():
    def accuracy(g):
        noise = 4.0 ** (2 - g.weight_bits[1]) + 0.5 * 4.0 ** (2 - g.activation_bits[0]) + 0.3 * (not g.form.per_channel)
        return 1 - 0.05 * math.exp(2 * noise) + float(rng.normal(0, 0.004))

    rng = np.random.default_rng(1)
    genomes = list({GenomeSampler(SPACE, LAYOUT).draw(rng) for _ in range(160)})
    taught, kept = genomes[:100], genomes[100:]
    process = NoiseProcess(taught, [accuracy(g) for g in taught])
    assert spearman(list(process(kept)), [accuracy(g) for g in kept]) > 0.9
    assert process(kept).max() < 1


def test_pairs_that_are_all_alike_are_no_failure():
    genome = Genome(SPACE.form, (4, 4), (4, 4))
    process = NoiseProcess([genome, genome], [0.5, 0.5])
    assert process([genome])[0] == pytest.approx(0.5, abs=1e-5)
