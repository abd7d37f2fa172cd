"""Modifiers that weigh images or add a term: wisdom of crowds, CEMA's two selections, the teachers' term, CAFA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategy_contexts import LineContext, step_of

from cloud.training.strategies.modifiers.cafa import Cafa, CafaSettings, alignment, gaussians
from cloud.training.strategies.modifiers.entropy_band import BandSettings, EntropyBand
from cloud.training.strategies.modifiers.redundancy import Redundancy, RedundancySettings
from cloud.training.strategies.modifiers.teachers import TeacherTerm, TeacherTermSettings
from cloud.training.strategies.modifiers.wisdom import WisdomOfCrowds, WisdomSettings, grown_confidence
from refold.errors import ModelError


def test_confidence_in_the_exported_answer_must_not_have_fallen() -> None:
    before = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    now = torch.tensor([[3.0, 0.0], [1.9, 0.0], [4.0, 0.0]])
    assert grown_confidence(now, before, 0.0).tolist() == [True, False, False]
    assert grown_confidence(now, before, 0.05).tolist() == [True, True, False]


def test_the_crowd_keeps_all_where_it_would_keep_none() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    crowd = WisdomOfCrowds(WisdomSettings())
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert crowd.weights(step_of(context, x)).tolist() == [1, 1]
    assert crowd.weights(step_of(context, x, exported=torch.tensor([[9.0, 0.0], [0.0, 0.5]]))).tolist() == [0, 1]
    assert crowd.weights(step_of(context, x, exported=torch.tensor([[9.0, 0.0], [0.0, 9.0]]))).tolist() == [1, 1]


def test_the_upper_threshold_follows_the_mean_entropy_after_the_warm_up() -> None:
    context = LineContext([1.0] * 10, [0.0] * 10)
    band = EntropyBand(BandSettings(band_warm_up=4, band_factor=1.0))
    band.begin(context)
    low, high = band.bounds(torch.tensor([1.0, 1.0]))
    assert low == pytest.approx(0.02 * math.log(10))
    assert high == pytest.approx(0.4 * math.log(10))
    _, high = band.bounds(torch.tensor([1.0, 1.0]))  # warm: the mean is 1
    assert high == pytest.approx(0.4 * math.log(10))
    _, high = band.bounds(torch.tensor([0.2, 0.2, 0.2, 0.2]))  # the mean of all eight is 0.6
    assert high == pytest.approx(0.6 * 0.4 * math.log(10))


def test_the_band_leaves_out_the_sure_and_the_unsure() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    band = EntropyBand(BandSettings())
    band.begin(context)
    assert band.weights(step_of(context, torch.tensor([[9.0, 0.0], [2.5, 0.0], [0.1, 0.0]]))).tolist() == [0, 1, 0]


def test_redundant_images_weigh_nothing() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    selection = Redundancy(RedundancySettings(redundancy_cosine=0.4))
    selection.begin(context)
    first = torch.tensor([[3.0, 0.0], [0.1, 0.0]])
    assert selection.weights(step_of(context, first)).tolist() == [1, 0]
    assert selection.weights(step_of(context, torch.tensor([[3.0, 0.0], [0.0, 3.0]]))).tolist() == [0, 1]


def test_the_teachers_term_is_a_weighed_cross_entropy() -> None:
    context = LineContext([1.0, 1.0], [0.0, 0.0])
    x, teachers = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    term = TeacherTerm(TeacherTermSettings(teachers_weight=2.0))
    log_p = x.numpy() - np.log(np.exp(x.numpy()).sum(1, keepdims=True))
    each = -(teachers.numpy() * log_p).sum(1)
    found = term.penalty(step_of(context, x, teachers=teachers, weights=torch.tensor([1.0, 0.0])))
    assert float(found.detach()) == pytest.approx(2 * each[0] / 2, rel=1e-5)


def test_class_wise_gaussians_are_shrunk_to_their_mean() -> None:
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [5.0, 9.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0]] * 2 + [[0.0, 0.0, 1.0]] * 2)
    classes, means, precisions = gaussians(features, targets, 0.5)
    assert classes.tolist() == [0, 2]
    assert means.tolist() == [[1.0, 0.0], [5.0, 7.0]]
    wanted = np.diag([0.5 * 1 + 0.5 * 0.5, 0.5 * 0 + 0.5 * 2])  # own covariances diag(1, 0) and diag(0, 4), their mean
    wanted += 1e-3 * np.diag(wanted).mean() * np.eye(2)
    assert np.allclose(precisions[0], np.linalg.inv(wanted), rtol=1e-4)


def test_alignment_is_the_log_ratio_of_own_and_other_distances() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    means = torch.tensor([[0.0, 0.0], [0.0, 5.0], [3.0, 0.0]])
    precisions = torch.stack([torch.eye(2), 2 * torch.eye(2), torch.eye(2)])
    own, other = (1 + 2 * 1) / 2, ((2 * 26 + 4) + (16 + 25)) / 2
    assert float(alignment(features, torch.tensor([0, 1]), means, precisions)) == pytest.approx(math.log(own / other), rel=1e-5)


def test_cafa_needs_calibration_images_of_two_classes() -> None:
    x = torch.tensor([[2.0, 0.0], [2.2, 0.1], [0.0, 3.0], [0.1, 2.5]])
    cafa = Cafa(CafaSettings(cafa_weight=2.0))
    context = LineContext([1.0, 1.0], [0.0, 0.0], x)
    cafa.begin(context)
    _, means, precisions = gaussians(x, context.calibration(4)[1], 0.5)
    seen = torch.tensor([[1.0, 0.5]])
    wanted = 2 * alignment(seen, torch.tensor([0]), means, precisions)
    assert float(cafa.penalty(step_of(context, seen))) == pytest.approx(float(wanted), rel=1e-5)
    for few in (None, x[:2]):
        with pytest.raises(ModelError, match="two classes"):
            Cafa(CafaSettings()).begin(LineContext([1.0, 1.0], [0.0, 0.0], few))
