"""Class moments: mixtures are exact, and the file keeps them to a thousandth of a deviation."""

from __future__ import annotations

import io

import numpy as np
import pytest
from statistics_of import CLASSES, class_moments, table

from refold.errors import BundleError
from refold.statistics import ClassMoments, Layout


def test_moments_of_a_mix_are_those_of_mixed_samples():
    rng = np.random.default_rng(0)
    samples = [rng.normal(k, 1 + k, (50_000, 3)) for k in range(CLASSES)]
    moments = ClassMoments(
        np.eye(CLASSES),
        np.stack([s.mean(0) for s in samples]),
        np.stack([s.var(0) for s in samples]),
        np.ones((CLASSES, 3)),
        np.ones((CLASSES, 3)),
        np.full(CLASSES, 9.0),
    )
    counts = (5_000, 20_000, 10_000, 15_000)
    mixed = np.concatenate([s[:n] for s, n in zip(samples, counts, strict=True)])
    mean, variance = moments.moments(np.array(counts) / sum(counts))
    np.testing.assert_allclose(mean, mixed.mean(0), atol=0.05)
    np.testing.assert_allclose(variance, mixed.var(0), rtol=0.03)


def test_a_mix_counts_answers_beside_a_prior():
    moments = class_moments(Layout(table()))
    answers = np.eye(CLASSES)[[0, 0, 0, 1]]
    np.testing.assert_allclose(moments.mix(answers, prior=0.5), np.array([3.5, 1.5, 0.5, 0.5]) / 6)
    np.testing.assert_allclose(moments.mix(answers, prior=0.0), [0.75, 0.25, 0, 0])


def test_groups_add_up_their_classes():
    layout = Layout(table())
    one = class_moments(layout)
    two = ClassMoments(
        np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]]),
        one.mean[:2],
        one.variance[:2],
        one.between[:2],
        one.spread[:2],
        np.full(2, 9.0),
    )
    np.testing.assert_allclose(two.mix(np.full((1, CLASSES), 0.25), prior=0.0), [0.5, 0.5])


def test_the_file_keeps_them():
    layout = Layout(table())
    moments, exported = class_moments(layout), (layout.row("mean", {}), layout.row("variance", {}))
    again = ClassMoments.from_bytes(moments.to_bytes(*exported), *exported, CLASSES)
    deviation = np.sqrt(exported[1])
    assert np.abs((again.mean - moments.mean) / deviation).max() < 2e-3
    np.testing.assert_allclose(again.variance, moments.variance, rtol=5e-3)
    np.testing.assert_allclose(again.between, moments.between, rtol=5e-3)
    np.testing.assert_allclose(again.spread, moments.spread, rtol=5e-3)
    np.testing.assert_allclose(again.counts, moments.counts)
    assert moments.to_bytes(*exported) == moments.to_bytes(*exported)


def test_damaged_or_foreign_files_are_refused():
    layout = Layout(table())
    exported = layout.row("mean", {}), layout.row("variance", {})
    content = class_moments(layout).to_bytes(*exported)
    for wrong in (b"", content[: len(content) // 2], b"PK" + content[2:60], content.replace(b"groups", b"gruops")):
        with pytest.raises(BundleError):
            ClassMoments.from_bytes(wrong, *exported, CLASSES)
    with pytest.raises(BundleError, match="damaged"):
        ClassMoments.from_bytes(content, *exported, CLASSES + 1)
    with np.load(io.BytesIO(content)) as arrays:
        held = dict(arrays)
    for name, value in (("mean", np.nan), ("format", 2)):
        out = io.BytesIO()
        np.savez(out, **{**held, name: np.full_like(held[name], value)})
        with pytest.raises(BundleError):
            ClassMoments.from_bytes(out.getvalue(), *exported, CLASSES)
