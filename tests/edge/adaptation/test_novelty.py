"""The novelty gate: the kernel it stands for, what is marked, what is learnt, and that neither memory nor uploads run away."""

from __future__ import annotations

import numpy as np
import pytest
from small_nets import images

from edge.adaptation.novelty import NoveltyGate, NoveltySettings


def answers(count, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (count, 5)).astype(np.float32)


def gate(**changes):
    return NoveltyGate(images(128, 16), answers(128), "d0", NoveltySettings(**{"every": 1, **changes}))


def foggy(pictures):
    return (pictures * 0.3 + 150).astype(np.uint8)


def looked(g, pictures, domain, seed=1):
    return [g.look(p, row, domain) for p, row in zip(pictures, answers(len(pictures), seed), strict=True)]


def test_products_of_vectors_are_the_gaussian_kernel():
    g = gate(dimensions=20_000)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 11))
    inverse = np.linalg.inv(g._whiten)
    hx, hy = g._encoded(g._centre + inverse @ x), g._encoded(g._centre + inverse @ y)
    assert hx @ hx == pytest.approx(1.0, abs=0.02)
    assert hx @ hy == pytest.approx(np.exp(-((x - y) ** 2).sum() / 22), abs=0.03)  # 2 * width


def test_the_threshold_is_the_quantile_of_each_image_against_the_others():
    g = gate(marked=0.05)
    vectors = np.stack([g._encoded(n) for n in _numbers_of(images(128, 16), answers(128))])
    each = [vectors[i] @ np.delete(vectors, i, 0).mean(0) for i in range(128)]
    assert g.share == pytest.approx(np.quantile(each, 0.05, method="lower") / np.mean(each), rel=1e-3)


def _numbers_of(pictures, logits):
    from edge.adaptation.novelty import _numbers

    return [_numbers(p, row) for p, row in zip(pictures, logits, strict=True)]


def test_what_is_like_calibration_is_hardly_marked_and_another_domain_is_until_it_is_known():
    g = gate()
    home = looked(g, images(400, 16, seed=5), "d0")
    assert np.mean([novel for novel, _ in home]) < 0.06
    fog = looked(g, foggy(images(400, 16, seed=6)), "d1")
    marks = np.array([novel for novel, _ in fog])
    assert marks[:24].mean() > 0.9  # before the domain is steady nothing of it is learnt
    assert marks[60:].mean() < 0.06  # it explains its own frames
    again = looked(g, foggy(images(50, 16, seed=7)), "d1")
    assert np.mean([novel for novel, _ in again]) < 0.1
    assert np.mean([novel for novel, _ in looked(g, images(100, 16, seed=8), "d0")]) < 0.06


def test_offers_stay_within_rate_and_room():
    g = gate(steady=10**6)  # nothing is learnt: everything stays novel
    fog = looked(g, foggy(images(500, 16, seed=6)), "d1")
    assert sum(novel for novel, _ in fog) > 450 and 20 <= sum(offered for _, offered in fog) <= 0.05 * 500 + 1
    g.allow(2)
    assert sum(offered for _, offered in looked(g, foggy(images(200, 16, seed=9)), "d1")) == 2
    assert g.metrics()["novel_offered"] == g.offered


def test_memory_stays_however_many_domains_come():
    g = gate(domains=3, steady=0)
    before = g.memory_bytes
    for k in range(8):
        looked(g, images(20, 16, seed=k), f"d{k}")
    assert len(g._bundles) == 4 and "d0" in g._bundles and g.memory_bytes == before < 2**20


def test_one_frame_in_three_is_looked_at_and_logits_that_are_not_finite_are_not():
    g = gate(every=3)
    assert len(looked(g, images(30, 16), "d0")) == 30 and g.looked == 10
    g = gate()
    bad = np.full(5, np.nan, np.float32)
    assert g.look(images(1, 16)[0], bad, "d0") == (False, False) and g.looked == 0


def test_too_little_calibration_is_refused():
    with pytest.raises(ValueError, match="8 calibration images"):
        NoveltyGate(images(7, 16), answers(7), "d0")
    with pytest.raises(ValueError, match="finite"):
        NoveltyGate(images(8, 16), np.full((8, 5), np.nan, np.float32), "d0")
