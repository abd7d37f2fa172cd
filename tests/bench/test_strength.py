"""Strengths learnt without labels: degradations are domains, and the search finds a lower strength where one helps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.strength.degradations import KINDS, draw
from bench.strength.judge import JUDGED, stream
from bench.strength.learn import Domain, by_group
from bench.strength.served import KEPT

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_a_domain(kind: str) -> None:
    one, same = (draw(kind, np.random.default_rng(3)) for _ in range(2))
    others = [draw(kind, np.random.default_rng(s))(IMAGES, np.random.default_rng(9)) for s in range(4, 12)]
    seen = one(IMAGES, np.random.default_rng(9))
    assert seen.shape == IMAGES.shape and seen.dtype == np.uint8
    assert not np.array_equal(seen, IMAGES)
    assert np.array_equal(seen, same(IMAGES, np.random.default_rng(9)))
    assert not all(np.array_equal(seen, other) for other in others)


class Fake:
    """Clean answers come back whole where the last site is followed to 0.4, and chance alone depends on the first."""

    sites = 3

    def again(self, kept: Any, worth: float, strength: Any, mix: Any) -> Any:
        return SimpleNamespace(kept=kept)

    def answers(self, found: Any, strength: Any, images: Any, *, guarded: bool) -> Any:
        luck = float(images.flat[0]) * (1 - strength[0])
        right = 0.9 - 0.5 * abs(strength[2] - 0.4) + luck
        return np.tile(np.array([right, 1 - right], np.float32), (4, 1))


def test_a_strength_is_lowered_where_that_is_no_chance() -> None:
    clean = np.tile(np.array([1.0, 0.0], np.float32), (4, 1))
    lucks = np.array([0.1, -0.1, 0.08, -0.08])
    domains: list[Any] = [
        Domain("", np.zeros(1), np.full(1, luck), clean, np.ones(2), 4.0, 0.5)  # type: ignore[arg-type]
        for luck in lucks
    ]
    said: list[str] = []
    found = by_group(Fake(), domains, 3, said.append)  # type: ignore[arg-type]
    assert found[0] == 1 and found[1] == 1
    assert found[2] == pytest.approx(0.4)
    assert said[0].startswith("1 everywhere")


def test_kept_and_judged_images_are_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(10), 100)
    images = np.zeros((1000, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(1000) // 256, np.arange(1000) % 256
    monkeypatch.setattr("bench.strength.judge.images_of", lambda name: (images, labels))
    monkeypatch.setattr("bench.strength.judge.corrupt", lambda name, severity, x, seed: x)
    seen, truth = stream("any", "frost", "mixed", 1)
    numbers = seen[:, 0, 0, 0].astype(int) * 256 + seen[:, 0, 0, 1]
    assert len(np.unique(numbers)) == len(numbers) == KEPT + JUDGED
    assert np.array_equal(labels[numbers], truth)
