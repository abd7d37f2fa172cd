"""The cloud measures a domain's statistics as a device does: on the student what the device measures on its engine."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_distil import PREPROCESS, noisy, pictures, trained

from cloud.distil import Student
from edge.engine import EngineFactory
from edge.serving import ServingState
from edge.statistics import estimate, measure_of
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.bundle import Bundle
from refold.statistics import StatisticsModel


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    images, labels = pictures(128, 1)
    path = tmp_path_factory.mktemp("population") / "s.refold"
    return export_model(trained(6, 0), path, PREPROCESS, Pictures(images, labels), Options(min_agreement=0.5)).bundle


@pytest.mark.parametrize("one_class", [False, True])
def test_student_and_device_serve_the_same_statistics(bundle: Bundle, one_class: bool) -> None:
    images, labels = pictures(160, 5)
    images = noisy(images[labels == 0] if one_class else images)[:64]
    model, student = StatisticsModel.of(bundle), Student(bundle)
    found = student.population(torch.from_numpy(PREPROCESS.apply(images))).measure()
    measure = measure_of(EngineFactory(bundle), model, 64)
    assert measure is not None
    theirs = estimate(measure, model, ServingState(), list(images))
    states, _ = model.served({}, theirs.moments, theirs.frames, theirs.mix)
    for site, m in zip(student.measured, found, strict=True):
        spread = np.sqrt(site.exported.variance)
        assert np.abs((m.mean.numpy() - states[site.name].mean) / spread).mean() < 0.05, site.name
        np.testing.assert_allclose(m.variance.numpy() / states[site.name].variance, 1, atol=0.15)


def test_less_strength_follows_less_and_the_mix_is_kept_between_passes(bundle: Bundle) -> None:
    x = torch.from_numpy(PREPROCESS.apply(noisy(pictures(64, 5)[0])))
    student = Student(bundle)
    sample = student.population(x)
    whole, again, half = sample.measure(), sample.measure(), sample.measure(0.5)
    exported = student.exported_moments()
    for w, a, e in zip(whole, again, exported, strict=True):
        np.testing.assert_allclose(a.mean.numpy(), w.mean.numpy(), atol=0.05 * float(e.variance.sqrt().max()))
    moved = [float((m[0].mean - exported[0].mean).abs().mean()) for m in (whole, half)]
    assert moved[1] == pytest.approx(0.5 * moved[0], rel=0.05)


def test_reported_moments_are_followed_as_far_as_no_mix_explains_them(bundle: Bundle) -> None:
    student = Student(bundle)
    exported = student.exported_moments()
    same = student.served(exported, 256.0, 1.0)
    for a, b in zip(exported, same, strict=True):
        np.testing.assert_allclose(a.mean.numpy(), b.mean.numpy(), atol=0.25 * float(a.variance.sqrt().max()))
