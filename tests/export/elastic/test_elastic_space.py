"""Forms, configurations, their codec, sampling and costs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.elastic.genome import BitSampler, GenomeSampler, genome_of
from export.elastic.layout import LayerPlace, Layout, ValuePlace
from export.elastic.space import (
    ActivationForm,
    Configuration,
    Form,
    Space,
    WeightForm,
    bit_operations,
    byte_count,
)
from refold.errors import UsageError

LAYOUT = Layout(
    (
        LayerPlace("first", "f", "input", 30, 3, 300, True),
        LayerPlace("a", "av", "f", 101, 5, 1000, False),
        LayerPlace("b", "bv", "av", 900, 10, 2000, False),
        LayerPlace("last", "l", "p", 20, 2, 20, True),
    ),
    (ValuePlace("input", 48, True), ValuePlace("f", 64, False), ValuePlace("av", 32, False), ValuePlace("p", 4, True)),
    other_bytes=1000,
)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
weight_forms = st.builds(WeightForm, st.integers(2, 8), st.booleans(), st.booleans())
value_forms = st.builds(ActivationForm, st.integers(2, 8), st.booleans())


def table(forms):
    return st.dictionaries(names, forms, max_size=8).map(lambda d: tuple(d.items()))


@given(st.builds(Configuration, table(weight_forms), table(value_forms)))
def test_any_configuration_survives_its_json(configuration):
    again = Configuration.from_json(configuration.to_json())
    assert again == configuration and hash(again) == hash(configuration)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
                    | st.dictionaries(st.sampled_from(["format", "weights", "activations", "x"]), x, max_size=4)))  # fmt: skip
def test_anything_else_is_refused_in_words(held):
    with pytest.raises(UsageError):
        Configuration.from_json(json.dumps(held))


@pytest.mark.parametrize(
    "row", [{"bits": 9, "symmetric": True}, {"bits": True, "symmetric": True}, {"bits": 4.0, "symmetric": True},
            {"bits": 4, "symmetric": 1}, {"bits": 4}, {"bits": 4, "symmetric": True, "x": 1}]
)  # fmt: skip
def test_a_form_out_of_range_is_refused(row):
    with pytest.raises(UsageError):
        Configuration.from_json(json.dumps({"format": 1, "weights": {}, "activations": {"v": row}}))


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("w2-8,a2-8", Space()),
        ("w3/4,a4,per-channel,w-symmetric", Space((3, 4), (4,), (True,), (True,))),
        ("a-asymmetric,a-symmetric,per-tensor", Space(granularities=(False,))),
    ],
)
def test_the_short_form(text, space):
    assert Space.parse(text) == space


@pytest.mark.parametrize("text", ["w1-8", "w9", "x4", "w", "a4-2", "per-group", "w4-"])
def test_a_wrong_short_form_says_what_there_is(text):
    with pytest.raises(UsageError):
        Space.parse(text)


def test_first_and_last_are_pinned_and_high_and_low_are_the_ends():
    space, rng = Space((2, 5), (3, 4)), np.random.default_rng(0)
    for kind, w, a in (("max", {5}, {4}), ("min", {2}, {3}), ("random", {2, 5}, {3, 4})):
        seen_w, seen_a, forms = set(), set(), set()
        for _ in range(40):
            c = space.draw(LAYOUT, rng, kind)
            space.check(LAYOUT, c)
            assert c.weight["first"].bits == c.weight["last"].bits == 8
            assert c.activation["input"].bits == c.activation["p"].bits == 8
            seen_w |= {c.weight[n].bits for n in "ab"}
            seen_a |= {c.activation[n].bits for n in ("f", "av")}
            forms |= {(f.per_channel, f.symmetric) for _, f in c.weights}
        assert (seen_w, seen_a, len(forms)) == (w, a, 4)


def test_what_the_space_lacks_is_refused():
    space = Space((2, 4), (4,), (True,), (True,), (True,))
    good = space.uniform(LAYOUT, 4, 4)
    space.check(LAYOUT, good)
    for bad in (
        Space().uniform(LAYOUT, 3, 4, good.form),
        Space().uniform(LAYOUT, 4, 4, Form(False, True, True)),
        Space().uniform(LAYOUT, 4, 4, Form(True, True, False)),
        Configuration(good.weights[1:], good.activations),
        Configuration((("first", WeightForm(4, True, True)), *good.weights[1:]), good.activations),
    ):
        with pytest.raises(UsageError):
            space.check(LAYOUT, bad)


def test_costs_by_hand():
    c = Space().uniform(LAYOUT, 3, 5, Form(True, True, True))
    weights = 30 + math.ceil(101 * 3 / 8) + math.ceil(900 * 3 / 8) + 20
    assert byte_count(LAYOUT, c) == 1000 + 4 * 5 + weights + 4 * (3 + 5 + 10 + 2)
    assert byte_count(LAYOUT, Space().uniform(LAYOUT, 3, 5, Form(False, False, True))) == 1000 + 20 + weights + 4 * 5
    assert bit_operations(LAYOUT, c) == 300 * 8 * 8 + 1000 * 3 * 5 + 2000 * 3 * 5 + 20 * 8 * 8


@given(st.floats(2.3, 7.7), st.lists(st.integers(1, 10_000), min_size=1, max_size=30))
def test_bits_are_drawn_around_the_wanted_average(average, sizes):
    shares = np.asarray(sizes) / sum(sizes)
    table = BitSampler((2, 3, 4, 5, 6, 7, 8), shares).probabilities(average)
    assert np.allclose(table.sum(1), 1)
    assert float(shares @ (table @ np.arange(2, 9))) == pytest.approx(round(average, 1), abs=0.02)


def test_sampled_genomes_reach_the_ends_and_keep_their_form():
    rng = np.random.default_rng(0)
    drawn = [GenomeSampler(Space(), LAYOUT).draw(rng) for _ in range(200)]
    assert {g.form for g in drawn} == set(Space().forms())
    average = [float(np.dot(LAYOUT.layer_shares, g.weight_bits)) for g in drawn]
    assert min(average) < 3 and max(average) > 7
    for g in drawn[:20]:
        assert genome_of(LAYOUT, g.configuration(Space(), LAYOUT)) == g
