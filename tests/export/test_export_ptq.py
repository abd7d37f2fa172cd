"""Post-training treatments: each does what its formula says, on networks small enough to check it."""

from __future__ import annotations

import json

import export_nets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.bits import parse_bits
from export.capture import capture
from export.engines import infer, session
from export.interpret import fake_quantise, float_parameters, run
from export.operators import evaluate
from export.pictures import Pictures
from export.pipeline import Options, export_model, fresh_export, make_recipe
from export.placement import is_integer_layer
from export.ptq import LayerSensitivity, compare, correct_bias, equalise, mixed, sensitivity
from export.quantise import dequantised_parameters
from export.rounding import prepared
from refold.cli import main
from refold.errors import UsageError

PICTURES = Pictures(export_nets.pictures(32), None)


def captured(name):
    return capture(export_nets.make(name), export_nets.SIZE, export_nets.SIZE)


def logits(graph, x):
    with torch.no_grad():
        return run(graph, torch.from_numpy(x), float_parameters(graph)).numpy()


@pytest.mark.parametrize("name", ["residual", "inverted", "vgg", "convnext"])
def test_equalised_layers_compute_the_same(name, x):
    graph, placement = prepared(captured(name))
    before = logits(graph, x)
    changed = equalise(graph, placement, x)
    graph.constants.update(changed)
    assert np.abs(logits(graph, x) - before).max() < 1e-3 * np.abs(before).max()
    if name in ("residual", "vgg"):
        assert changed


def test_equalising_evens_out_what_one_scale_must_hold(x):
    """A channel fifty times the others takes all codes for itself; afterwards ranges lie closer together and less is lost."""
    net = export_nets.make("vgg")
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        norms[0].weight[0] *= 50
        norms[0].bias[0] *= 50
    plain = make_recipe(net, export_nets.PREPROCESS, PICTURES, Options())
    even = make_recipe(net, export_nets.PREPROCESS, PICTURES, Options(equalise=True))
    without, having = even.treated["equalise"]
    assert without == plain.calibration.errors[plain.calibration.chosen]
    assert having < without and even.calibration.errors[even.calibration.chosen] == having
    assert not any(np.array_equal(even.model.weights[o].codes, w.codes) for o, w in list(plain.model.weights.items())[1:2])
    assert np.array_equal(
        next(iter(even.model.weights.values())).codes, next(iter(plain.model.weights.values())).codes
    )  # the first layer's division went into gamma and beta


def test_a_corrected_channel_has_no_mean_error_and_no_channel_gets_worse(x):
    net, options = export_nets.make("residual"), Options(bits=parse_bits(["w2a8", "*=w2"]))
    recipe = make_recipe(net, export_nets.PREPROCESS, PICTURES, options)
    graph, placement = prepared(recipe.graph)
    layers = [n for n in graph.nodes if is_integer_layer(placement, n)]
    changed = correct_bias(graph, placement, recipe.model.weights, recipe.scales, x)
    assert set(changed) == {n.parameters["mean" if "gamma" in n.parameters else "bias"] for n in layers}
    first = layers[0]  # the one layer whose input no correction has changed
    bare = first.with_attributes(activation=None)
    seen = fake_quantise(torch.from_numpy(x), recipe.scales[graph.input])
    truth = evaluate(bare, [torch.from_numpy(x)], float_parameters(graph)(first))
    before = evaluate(bare, [seen], dequantised_parameters(graph, recipe.model.weights)(first))
    old = graph.constants[first.parameters["mean"]].copy()
    graph.constants.update(changed)
    after = evaluate(bare, [seen], dequantised_parameters(graph, recipe.model.weights)(first))
    moved = torch.from_numpy(old != graph.constants[first.parameters["mean"]])
    assert moved.any() and (before - truth).mean((0, 2, 3))[moved].abs().min() > 1e-4
    assert (after - truth).mean((0, 2, 3))[moved].abs().max() < 1e-4
    error = [((y.relu() - truth.relu()) ** 2).mean((0, 2, 3)) for y in (before, after)]
    assert (error[1] <= error[0] * 1.0001).all()


def test_few_bits_lose_less_with_corrected_biases(tmp_path, x):
    """And the bundle keeps its promises: the self-check ran on the corrected norms."""
    options = Options(bits=parse_bits(["w3"]), correct_bias=True, min_agreement=0.0)
    done = export_model(export_nets.make("residual"), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, options)
    without, having = done.recipe.treated["correct_bias"]
    assert having < without
    twin, _ = fresh_export(done.recipe, {})
    assert np.isfinite(infer(session(twin.model), x)).all()


def test_sensitivity_grows_as_bits_fall(x):
    graph, placement = prepared(captured("residual"))
    rows = sensitivity(graph, placement, x, 127)
    assert [r.name for r in rows] == [n.name for n in graph.nodes if is_integer_layer(placement, n)]
    assert rows[0].pinned and rows[-1].pinned and not any(r.pinned for r in rows[1:-1])
    for row in rows:
        assert row.errors[2] > row.errors[4] > row.errors[8] > 0


@st.composite
def tables(draw):
    rows = []
    for i in range(draw(st.integers(3, 7))):
        base, fall = draw(st.floats(0.01, 1)), draw(st.floats(0.2, 0.8))
        errors = {b: base * fall**b for b in (2, 3, 4, 5, 6, 8)}
        rows.append(LayerSensitivity(f"l{i}", draw(st.integers(1, 5000)), errors, i == 0))
    return rows


@given(tables(), st.floats(0, 1))
def test_a_mixture_fits_its_budget_and_no_cheaper_move_was_left(rows, share):
    most = sum(r.size(8) for r in rows)
    least = sum(r.size(8 if r.pinned else 2) for r in rows)
    budget = int(least + share * (most - least))
    plan, bits = mixed(rows, budget)
    assert sum(r.size(bits[r.name]) for r in rows) <= budget
    assert bits["l0"] == 8 and plan.lines[0][1].weights == 8
    if budget == most:
        assert set(bits.values()) == {8}
    with pytest.raises(UsageError, match=f"{least:,}"):
        mixed(rows, least - 1)


def test_noise_by_layer_falls_with_bits(x):
    few, many = (
        make_recipe(export_nets.make("residual"), export_nets.PREPROCESS, PICTURES, Options(bits=parse_bits([b])))
        for b in ("w3a4", "w8")
    )
    low, high = (compare(r.truth, r.model, x) for r in (few, many))
    assert set(low) == set(high) == {few.model.graph.input, *(n.output for n in few.model.graph.nodes)}
    assert all(high[v] > low[v] + 6 for v in list(high)[2:-1])
    assert low[few.model.graph.output] < high[few.model.graph.output]


def test_from_the_command_line(tmp_path, npz, capsys):
    out, net = tmp_path / "m.refold", f"{export_nets.__file__}:residual"
    common = ["export", net, "--calibration", str(npz), "--preprocess", "16x16,imagenet", "--min-agreement", "0"]
    main([*common, "-o", str(out), "--budget", "2.5KB", "--equalise", "--correct-bias", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert set(told["treated"]) == {"equalise", "correct_bias"} and told["sensitivities"] and min(told["bits"].values()) < 7
    main(["inspect", str(out), "--json"])
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert sum(row["bytes"] for row in layers if row["runs_in"] == "int8") <= 2500
    main(["inspect", str(out), "--compare"])
    shown = capsys.readouterr().out
    assert "dB" in shown and "Most is lost at" in shown and layers[0]["name"] in shown
    for bad, says in (("1B", "No choice of bits fits"), ("lots", "no size")):
        with pytest.raises(SystemExit) as stopped:
            main([*common, "-o", str(tmp_path / "n.refold"), "--budget", bad])
        assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.refold"]
