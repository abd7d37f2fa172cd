"""Class groups: each class alone where there are few, else those that answer alike together."""

from __future__ import annotations

import numpy as np

from export.statistics.groups import MOST, class_groups


def test_few_classes_are_groups_of_their_own():
    np.testing.assert_array_equal(class_groups(np.zeros((5, 10))), np.eye(10))


def test_classes_that_rise_on_the_same_images_are_together():
    rng = np.random.default_rng(0)
    kind = np.arange(200) % 8
    base = rng.normal(0, 1, (300, 8))
    logits = base[:, kind] + 0.1 * rng.normal(0, 1, (300, 200))
    groups = class_groups(logits, most=8)
    assert groups.shape == (200, 8) and (groups.sum(1) == 1).all()
    for k in range(8):
        assert len({int(g) for g in groups[kind == k].argmax(1)}) == 1
    np.testing.assert_array_equal(groups, class_groups(logits, most=8))


def test_a_thousand_classes_on_few_images_are_at_most_sixteen_groups():
    logits = np.random.default_rng(1).normal(0, 1, (30, 1000))
    groups = class_groups(logits)
    assert 1 < groups.shape[1] <= MOST and (groups.sum(0) > 0).all()


def test_classes_that_are_never_told_apart_are_one_group():
    groups = class_groups(np.zeros((20, 50)))
    assert groups.shape == (50, 1)
