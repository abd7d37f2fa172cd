"""The student is the engine, trainable: same function at any state, gradients to the norms only."""

from __future__ import annotations

import io

import export_nets
import numpy as np
import pytest
import torch

from export.checks import perturbed
from export.engines import infer, session
from export.pictures import Pictures
from export.pipeline import make_recipe
from export.student import flat, student_program


@pytest.fixture
def program(residual):
    return torch.export.load(io.BytesIO(residual.bundle.read("student.pt2")))


def test_names_are_those_of_the_contract(program, residual):
    state = program.state_dict
    for site in residual.bundle.norms.norms:
        stem = f"norms.{site.name.replace('.', '__')}"
        for role in ("gamma", "beta", "mean", "variance"):
            assert np.array_equal(state[f"{stem}.{role}"].detach().numpy(), getattr(site.exported, role))
    trainable = {name for name, _ in program.named_parameters()}
    assert trainable == {f"norms.{flat(s.name)}.{r}" for s in residual.bundle.norms.norms for r in ("gamma", "beta")}
    norms = [n for n in program.graph.nodes if n.target == torch.ops.aten.batch_norm.default]
    assert len(norms) == len(residual.bundle.norms.norms)
    assert all(a.op == "placeholder" for n in norms for a in n.args[1:5])
    assert any(n.target == torch.ops.aten.fake_quantize_per_tensor_affine.default for n in program.graph.nodes)
    assert state["layers.relu.codes"].dtype == torch.int8


@pytest.mark.parametrize("strength", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 7])
def test_it_computes_the_engine_at_any_state(program, residual, x, strength, batch):
    table = residual.bundle.norms
    states = perturbed(table, strength)
    module = program.module()
    with torch.no_grad():
        for name, state in states.items():
            for role in ("gamma", "beta", "mean", "variance"):
                dict([*module.named_parameters(), *module.named_buffers()])[f"norms.{flat(name)}.{role}"].copy_(
                    torch.from_numpy(np.array(getattr(state, role)))
                )
        got = module(torch.from_numpy(x[:batch])).numpy()
    engine = infer(session(residual.bundle.read(residual.bundle.target().model), table.tensors(states)), x[:batch])
    step = (engine.max() - engine.min()) / 255
    assert np.mean(np.abs(got - engine) <= 2 * step) >= 0.99


def test_training_moves_the_norms_and_nothing_else(program, x):
    module = program.module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    inputs, labels = torch.from_numpy(x), torch.arange(len(x)) % export_nets.CLASSES
    optimiser = torch.optim.Adam(module.parameters(), 0.02)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(module(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in module.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    changed = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("net", ["vit", "grouped", "dense"])
def test_explicit_norms_are_trainable_too(net):
    recipe = make_recipe(export_nets.make(net), export_nets.PREPROCESS, Pictures(export_nets.pictures(16), None))
    module = torch.export.load(io.BytesIO(student_program(recipe.model))).module()
    module(torch.from_numpy(export_nets.PREPROCESS.apply(export_nets.pictures(3)))).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())
