"""Every strategy and modifier through the distiller: on a small trained net, from the settings to an admissible candidate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from distil_bundles import bundle_of
from test_distil import PREPROCESS, noisy, pictures, trained
from torch import nn

from cloud.distil import Candidate, Distiller, DistilSettings, Student, Teacher, Teachers
from cloud.distil.recipe import Calibration
from cloud.training.context import StudentContext
from cloud.training.strategies.registry import MODIFIERS, OWN_LOOPS, STRATEGIES
from refold.bundle import Bundle
from refold.errors import ModelError

FAST = {"steps": 6, "group": 16, "refresh": 4, "mixes": ()}
SHARED = [name for name in STRATEGIES if name not in OWN_LOOPS]
LEAST = {"cotta": {"views": 2}, "petal": {"fit_steps": 2}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    images, labels = pictures(96, 1)
    return bundle_of(trained(6, 0), tmp_path_factory.mktemp("strategies") / "s.refold", PREPROCESS, images, labels, 4)


@pytest.fixture(scope="module")
def teachers() -> Teachers:
    return Teachers([Teacher("wide", trained(16, 1)), Teacher("other", trained(12, 2))], PREPROCESS)


def candidate(bundle: Bundle, teachers: Teachers, recipe: str, **settings: Any) -> Candidate:
    made = Distiller(
        bundle, teachers, DistilSettings.of({**FAST, "recipe": recipe, "options": LEAST.get(recipe, {}), **settings})
    )
    made.add_samples(noisy(pictures(64, 5)[0]), "d1", np.ones(64, bool))
    return made.train("d1")


@pytest.mark.parametrize("recipe", SHARED)
def test_a_strategy_gives_an_admissible_candidate_and_the_same_one_again(
    bundle: Bundle, teachers: Teachers, recipe: str
) -> None:
    found = candidate(bundle, teachers, recipe)
    bundle.norms.check(found.states)
    assert found.samples == 64
    assert np.isfinite(list(found.metrics.values())).all()
    assert any(not np.array_equal(found.states[s.name].gamma, s.exported.gamma) for s in bundle.norms.norms) or (
        found.metrics["share"] == 0
    )
    assert candidate(bundle, teachers, recipe).states == found.states


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_combines_with_a_strategy(bundle: Bundle, teachers: Teachers, name: str) -> None:
    plain = candidate(bundle, teachers, "distillation")
    changed = candidate(bundle, teachers, "distillation", modifiers=(name,))
    bundle.norms.check(changed.states)
    assert changed.metrics["loss_last"] != plain.metrics["loss_last"] or changed.metrics["mean_weight"] == 1


def test_all_modifiers_together(bundle: Bundle, teachers: Teachers) -> None:
    found = candidate(bundle, teachers, "roid", modifiers=tuple(MODIFIERS), options={"crowd_margin": 0.1})
    bundle.norms.check(found.states)
    assert found.metrics["mean_weight"] < 1


@pytest.mark.parametrize("name", ["label-shift", "teacher-weights"])
def test_corrected_teachers_go_with_the_refold_recipe_too(bundle: Bundle, teachers: Teachers, name: str) -> None:
    assert candidate(bundle, teachers, "refold", modifiers=(name,)).states != candidate(bundle, teachers, "refold").states


def test_an_open_student_gives_what_a_fresh_one_gives(bundle: Bundle, teachers: Teachers) -> None:
    student, found = Student(bundle), []
    for recipe in ("sar", "refold", "cema-paper", "roid"):
        made = Distiller(bundle, teachers, DistilSettings.of({**FAST, "recipe": recipe}), student=student)
        made.add_samples(noisy(pictures(64, 5)[0]), "d1", np.ones(64, bool))
        found.append((recipe, made.train("d1").states))
    assert all(candidate(bundle, teachers, recipe).states == states for recipe, states in found)


def test_distillation_learns(bundle: Bundle, teachers: Teachers) -> None:
    found = candidate(bundle, teachers, "distillation", steps=40, options={"rate": 5e-3})
    assert found.metrics["loss_last"] < found.metrics["loss_first"]
    assert found.metrics["held_back_loss"] <= found.metrics["held_back_loss_before"]


def context_of(bundle: Bundle, *, features: bool = True) -> tuple[Student, StudentContext]:
    student = Student(bundle)
    made = StudentContext(
        student, PREPROCESS, Calibration.of(bundle), 4, torch.Generator().manual_seed(0), batch=16, features=features
    )
    return student, made


def test_the_context_answers_for_other_values_and_leaves_the_student_as_it_was(bundle: Bundle) -> None:
    student, context = context_of(bundle)
    x, targets = context.calibration(40)
    assert x.shape == (40, 3, 16, 16)
    assert targets.sum(1).tolist() == [1.0] * 40
    exported = context.exported_answers(x)
    assert torch.allclose(exported.logits, student.logits(x), atol=1e-5)
    assert exported.known_features.shape == (40, 12)
    before = student.snapshot()
    doubled = [2 * p.detach() for p in student.parameters]
    other = context.answers(x, doubled).logits
    assert all(torch.equal(a, b) for a, b in zip(before, student.snapshot(), strict=True))
    student.restore(doubled)
    assert torch.allclose(other, student.logits(x, student.exported_moments()), atol=1e-5)


def test_looking_at_other_values_keeps_a_waiting_gradient_whole(bundle: Bundle) -> None:
    student, context = context_of(bundle, features=False)
    x, _ = context.calibration(8)
    student.trainable(True)
    context.look(x).logits.pow(2).sum().backward()
    wanted = [p.grad.clone() for p in student.parameters if p.grad is not None]
    for p in student.parameters:
        p.grad = None
    loss = context.look(x).logits.pow(2).sum()
    context.answers(x, [torch.zeros_like(p) for p in student.parameters])
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(wanted, student.parameters, strict=True) if p.grad is not None)


def test_gradients_at_exported_values_are_those_of_autograd(bundle: Bundle) -> None:
    student, context = context_of(bundle, features=False)
    x, targets = context.calibration(8)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return -(targets * torch.log_softmax(logits, 1)).sum(1).mean()

    found = context.exported_gradients(x, loss, context.exported)
    student.load({})
    student.trainable(True)
    loss(student.logits(x, student.exported_moments())).backward()
    for g, p in zip(found, student.parameters, strict=True):
        assert p.grad is not None
        assert torch.allclose(g, p.grad, atol=1e-6)


def test_a_network_without_a_linear_layer_has_no_features(tmp_path: Path) -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(x)).mean((2, 3))

    images, labels = pictures(8, 1)
    bare = bundle_of(Convolutional(), tmp_path / "c.refold", PREPROCESS, images, labels, 4)
    _, context = context_of(bare)
    with pytest.raises(ModelError, match="linear layer"):
        context.exported_answers(torch.zeros(2, 3, 16, 16))
