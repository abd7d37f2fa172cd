"""The strategies benchmark without its networks: rows, halves, the rate and the default the table names, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.corrupt import NAMES
from bench.result import Options, show
from bench.strategies import pieces, run
from bench.strategies.pieces import Piece, Work, run_pieces
from bench.strategies.report import best_rate, build, claims, plot
from bench.strategies.rows import FULL, QUICK, ROWS, STATISTICS, Scale
from bench.strategies.teachers import CachedTeachers
from cloud.distil import DistilSettings, Teacher, Teachers
from cloud.training.strategies.registry import MODIFIERS, STRATEGIES
from refold.errors import UsageError
from refold.preprocess import Preprocess


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_nothing_is_chosen_on_what_is_reported(scale: Scale) -> None:
    assert not set(scale.development) & set(scale.report)
    assert set(scale.tuning) <= set(scale.development)
    assert set(scale.development) | set(scale.report) <= set(NAMES)
    assert scale.development_seed != Options().seed
    assert scale.uploads + scale.judged <= 10_000


def test_every_strategy_and_modifier_has_a_row_that_the_settings_take() -> None:
    assert {r.recipe for r in ROWS} == {*STRATEGIES, STATISTICS} - {"cema-released"}, "its steps are cema-paper's"
    assert {m for r in ROWS for m in r.modifiers} == set(MODIFIERS)
    names = [r.name for r in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        if row.recipe != STATISTICS:
            made = row.settings(0.01, FULL) if row.recipe not in ("cema-paper",) else row.settings(0, FULL)
            assert made.recipe == row.recipe
            assert made.modifiers == row.modifiers
        base = next((r for r in ROWS if r.name == row.base), None)
        assert (base is not None and base.recipe == row.recipe) == bool(row.modifiers)


def made_up(work: Work, scale: Scale) -> Piece:
    """Refold 1 point above the rest on the development half, half a point under eata on the report half."""
    base = 70.0 if work.row != STATISTICS else 65.0
    developing = work.corruption in scale.development
    gain = {"refold": 1.0 if developing else -0.5}.get(work.row, 0.0)
    if developing and work.rate == 3e-3:
        gain -= 0.25
    return Piece(work, base + gain, 50.0, 1.0, 0.1)


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Work]:
    done: list[Work] = []

    def fake(work: Work, scale: Scale) -> Piece:
        done.append(work)
        piece = made_up(work, scale)
        pieces._keep(work, scale, piece)
        return piece

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pieces, "_run", fake)
    return done


def test_a_whole_run_chooses_rates_and_names_a_default(no_networks: list[Work], tmp_path: Path) -> None:
    result = run(Options(target=tmp_path / "s.json"))
    assert len(result.rows) == len(ROWS)
    assert result.rows[0]["row"] == "refold"
    assert result.settings["best on the development half"] == "refold"
    by_name = {line["row"]: line for line in result.rows}
    assert by_name["roid"]["rate"] == 1e-3
    assert by_name["roid"]["tuning at 0.003"] == 69.75
    assert by_name["roid + teachers"]["rate"] == 1e-3
    assert by_name[STATISTICS]["rate"] is None
    assert by_name["eata"]["report"] == 70.0
    assert not any(w.rate == 3e-3 for w in no_networks if w.corruption in FULL.report)
    found = {c.id: c for c in result.claims}
    assert (found["strategies.default"].value, found["strategies.default"].holds) == (1.0, True)
    assert (found["strategies.report"].value, found["strategies.report"].holds) == (-0.5, False)
    assert found["strategies.gain"].value == 4.5
    plot(result, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000
    show(result)


def test_a_run_goes_on_where_it_stopped(no_networks: list[Work], tmp_path: Path) -> None:
    only = ("distillation + crowds",)
    first = run(Options(target=tmp_path / "s.json", quick=True, only=only))
    assert {line["row"] for line in first.rows} == {"distillation", "distillation + crowds"}, "a row brings its base"
    count = len(no_networks)
    assert count == 6
    again = run(Options(target=tmp_path / "s.json", quick=True, only=only, resume=True))
    assert len(no_networks) == count
    assert again.rows == first.rows
    changed = run_pieces([Work("distillation", 9.0, "fog", 0)], QUICK, "x", processes=1, resume=True)
    assert changed[0].work.rate == 9.0
    assert len(no_networks) == count + 1


def test_an_unknown_row_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"No row is called like magic; there are statistics, refold"):
        run(Options(only=("magic",)))


def test_the_best_rate_is_that_of_the_mean() -> None:
    found = [
        Piece(Work("a", r, c, 100), v, 0, 1, 0) for r, c, v in ((1, "x", 9.0), (1, "y", 1.0), (2, "x", 6.0), (2, "y", 6.0))
    ]
    assert best_rate("a", found) == 2


def test_claims_without_their_rows_hold_nothing() -> None:
    assert not any(c.holds for c in claims([]))
    row = next(r for r in ROWS if r.name == "eata")
    done = [
        Piece(Work("eata", 1e-3, c, s), 70.0, 50.0, float("nan"), 1.0) for c, s in (("gaussian_noise", 100), ("contrast", 0))
    ]
    result = build([row], {"eata": 1e-3}, done, QUICK)
    assert result.rows[0]["share"] is None
    assert not any(c.holds for c in result.claims)


def test_remembered_teachers_are_asked_once_for_each_state_they_are_in() -> None:
    class Counting(Teachers):
        asked = 0

        def probabilities(self, images: Any, domain: str = "") -> Any:
            Counting.asked += 1
            return np.full((len(images), 2), 0.5, np.float32)

        def adapt(self, domain: str, images: Any) -> None:
            Counting.asked += 100

    class Kept(CachedTeachers, Counting):
        pass

    inner = Counting([Teacher("t", lambda x: x)], Preprocess(4, 4), DistilSettings())
    kept = Kept(inner)
    images = np.zeros((3, 4, 4, 3), np.uint8)
    for _ in range(2):
        kept.adapt("d", images)
        kept.probabilities(images, "d")
    assert Counting.asked == 101
    kept.adapt("d", images + 1)
    kept.probabilities(images, "d")
    assert Counting.asked == 202
    kept.forget("d")
    kept.probabilities(images, "d")
    assert Counting.asked == 203
