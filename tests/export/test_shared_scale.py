"""Values of very different ranges under one scale: kept apart on every target, named, and nothing else is changed."""

from __future__ import annotations

import json

import export_nets
import numpy as np
import pytest
import ranges_nets
import torch
from click.testing import CliRunner

from export.diagnose.channels import channel_errors, lost_channels, ranges_told
from export.engines import infer, session
from export.pictures import Pictures
from export.pipeline import Options, export_model, make_recipe
from export.runtimes import runtime_of
from export.targets import TARGETS, write
from refold.bundle import Bundle
from refold.inspection import inspect

PICTURES = Pictures(export_nets.pictures(48), None)
UNSEEN = export_nets.PREPROCESS.apply(export_nets.pictures(40, seed=9))
# class → (node that stays in float, its operator, other nodes that do, first lost output)
LOSSY = {
    "Detector": ("cat", "concat", (), 64),
    "Stacked": ("stack", "concat", (), 4),
    "OneHead": ("head", "conv", (), 4),
    "ReadAgain": ("cat", "concat", ("last",), 3),
    "Sum": ("add", "add", (), 4),
}


@pytest.mark.parametrize("net", LOSSY)
def test_outputs_of_a_small_range_survive(net, tmp_path):
    model = ranges_nets.make(net)
    name, op, others, first = LOSSY[net]
    targets = ("ort-x86-avx2", "litert") if net == "Detector" else ("ort-x86-avx2",)
    if "litert" in targets:
        pytest.importorskip("ai_edge_litert")
    done = export_model(model, tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, Options(targets, observer="minmax"))
    with torch.no_grad():
        truth = model(torch.from_numpy(UNSEEN)).numpy()
    engine = session(done.bundle.read(done.bundle.target().model), done.bundle.norms.tensors())
    assert channel_errors(infer(engine, UNSEEN), truth).max() < 0.25
    assert [(s.name, s.op, s.lost[0]) for s in done.recipe.shared] == [(name, op, first)]
    told = {layer.name: layer.runs_in for layer in done.bundle.manifest.layers}
    assert f"would lose outputs {first} to" in told[name] and told[name].startswith("float: one 8-bit scale for")
    assert [n for n, runs in told.items() if runs == f"float: reads {name}, which stays in float"] == list(others)
    assert not [f for f in done.findings if f.code == "lost-channels"]


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in ("ort-x86-avx2", "ort-arm64")])
def test_every_target_keeps_the_scores(target):
    if TARGETS[target].runtime == "litert":
        pytest.importorskip("ai_edge_litert")
    model = ranges_nets.make("Detector")
    recipe = make_recipe(model, export_nets.PREPROCESS, PICTURES, Options((target,), observer="minmax"))
    logits = runtime_of(TARGETS[target]).logits(write(TARGETS[target], recipe.model), recipe.model, UNSEEN[:16])
    with torch.no_grad():
        truth = model(torch.from_numpy(UNSEEN[:16])).numpy()
    assert channel_errors(logits, truth).max() < 0.4


def test_without_it_every_score_is_lost():
    """What the concatenation did on one scale: the integer engine's scores are all zero, and 12 of 16 outputs look fine."""
    model = ranges_nets.make("Detector")
    recipe = make_recipe(model, export_nets.PREPROCESS, PICTURES, Options(observer="minmax"))
    with torch.no_grad():
        truth = model(torch.from_numpy(UNSEEN)).numpy()
    step = truth.max() / 255
    rounded = (np.rint(truth / step) * step).astype(np.float32)
    found = list(lost_channels("ort", rounded, truth))
    assert found[0].numbers["lost"] == 48 and "64 to 111" in found[0].message
    assert recipe.shared and not list(lost_channels("ort", truth, truth))


def test_similar_ranges_stay_in_integers():
    recipe = make_recipe(ranges_nets.make("Alike"), export_nets.PREPROCESS, PICTURES, Options(observer="minmax"))
    assert not recipe.shared and all(
        recipe.model.placement.is_quantised(n.output) for n in recipe.model.graph.nodes if n.op == "concat"
    )


def test_a_constant_output_is_not_lost():
    truth = np.stack([np.linspace(0, 320, 20), np.full(20, 0.3), np.linspace(0, 1, 20)], 1).astype(np.float32)
    got = truth + np.float32(0.6)
    assert channel_errors(got, truth).tolist() == pytest.approx([0.6 / truth[:, 0].std(), 0, 0.6 / truth[:, 2].std()], rel=1e-4)
    assert ranges_told([0, 1, 2, 5, 7, 8, 10, 12]) == "0 to 2, 5, 7 to 8, 10, ..."


def test_export_and_inspect_name_it(tmp_path, capsys):
    from export.cli import _report

    done = export_model(
        ranges_nets.make("Detector"), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, Options(observer="minmax")
    )
    _report(done, 48, (), 1.0, False)
    assert "cat (concat) stays in float: one 8-bit scale for values up to" in capsys.readouterr().out
    _report(done, 48, (), 1.0, True)
    told = json.loads(capsys.readouterr().out)["shared_scales"][0]
    assert told["name"] == "cat" and told["outputs"] == list(range(64, 112)) and len(told["parts"]) == 2
    shown = CliRunner().invoke(inspect, [str(tmp_path / "m.refold")]).output
    assert "would lose outputs 64 to 111" in shown
    assert Bundle.open(tmp_path / "m.refold").digest == done.bundle.digest
