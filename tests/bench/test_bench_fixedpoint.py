"""The fixed-point benchmark on a net that takes no time: rows, claims, pictures, and going on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from bench import fixedpoint
from bench.models import photographs
from bench.result import Options, show
from demo.models import CifarResNet
from refold.errors import UsageError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures(split: str) -> tuple[np.ndarray, np.ndarray]:
        images = photographs(48, 32, seed=len(split))
        return images, np.asarray(images.mean((1, 2, 3)) > 120, np.int64)

    monkeypatch.setattr(fixedpoint, "cifar10", pictures)
    monkeypatch.setattr(fixedpoint, "resnet20", lambda: CifarResNet(1).eval())
    quick = {**fixedpoint.QUICK, "epochs": 1, "batch": 16, "lookback": (1, 2), "from_scratch": True}
    monkeypatch.setattr(fixedpoint, "QUICK", quick)
    monkeypatch.setattr(fixedpoint, "TESTED", {True: 32})
    monkeypatch.setattr(fixedpoint, "CHOOSING", 12)


@pytest.mark.usefixtures("small")
def test_every_row_is_measured(tmp_path: Path) -> None:
    result = fixedpoint.run(Options(quick=True, target=tmp_path / "r.json"))
    rows = {str(r["row"]): r for r in result.rows}
    assert list(rows) == ["start", "float32", "published", "eight bits", "integers", "shifts"]
    assert rows["eight bits"]["bits"] == 8 and rows["eight bits"]["switches"] == 0
    assert rows["float32"]["bits"] == 32 and "engine %" not in rows["float32"]
    assert rows["published"]["bits"] >= 12 and rows["published"]["integer layers"] == 0
    assert rows["integers"]["bits"] <= 8 and rows["integers"]["integer layers"] == 8
    assert 0.05 < rows["integers"]["shift error"] < 1 / 3 and rows["integers"]["measured inference"] > 0
    assert abs(rows["integers"]["engine %"] - rows["integers"]["accuracy %"]) <= 7  # two pictures of 32
    assert abs(rows["shifts"]["engine %"] - rows["shifts"]["accuracy %"]) <= 7
    assert {c.id for c in result.claims} >= {"fixedpoint.published.size", "fixedpoint.integers.latency"}
    assert not list(tmp_path.glob("*.pt"))
    fixedpoint.plot(result, tmp_path / "r.png")
    show(result)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG") and len(result.encode()) > 1000


def test_claims_compare_with_the_model_before_and_with_float32() -> None:
    """A float training that lost six points is no baseline to gain on."""
    rows = [
        {"row": "start", "accuracy %": 86.0, "size ratio": 1.0},
        {"row": "float32", "accuracy %": 80.0},
        {"row": "eight bits", "accuracy %": 82.5, "size ratio": 0.25},
        {"row": "integers", "accuracy %": 83.0, "size ratio": 0.2, "measured inference": 1.5, "engine %": 83.2},
    ]
    found = {c.id: c for c in fixedpoint.claims(rows)}
    assert found["fixedpoint.integers.float32"].value == 3 and found["fixedpoint.integers.float32"].holds
    assert found["fixedpoint.integers.start"].value == -3 and not found["fixedpoint.integers.start"].holds
    assert not found["fixedpoint.float32.start"].holds
    assert found["fixedpoint.switching.size"].holds and found["fixedpoint.switching.accuracy"].value == 0.5
    assert found["fixedpoint.integers.latency"].holds and math.isclose(found["fixedpoint.integers.engine"].value, 0.2)
    assert "fixedpoint.published.size" not in found


def test_no_rate_is_chosen_on_what_is_reported() -> None:
    images = np.arange(10_000)[:, None, None, None]
    shown, _ = fixedpoint.reported(images, np.zeros(10_000, np.int64), 8000)
    assert shown.min() == fixedpoint.CHOOSING and len(np.unique(shown)) == 8000
    assert set(fixedpoint.RATES) == set(fixedpoint.ROWS)


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="float32"):
        fixedpoint.run(Options(only=("banana",)))
    assert (
        fixedpoint.settings_of("published", False, 3).longest == 32 and fixedpoint.settings_of("shifts", True, 3).power_of_two
    )
