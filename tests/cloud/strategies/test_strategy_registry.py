"""The registry: every name leads to a strategy that says what it is, and nothing else is taken."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest

from cloud.distil.settings import DistilSettings, ModifierName, RecipeName
from cloud.training.step import Modifier, Settings, Strategy, TargetModifier
from cloud.training.strategies.registry import MODIFIERS, OWN_LOOPS, STRATEGIES, check, make_modifiers, make_strategy
from refold.errors import UsageError

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "adaptation.md"
BASES = {"loss": Strategy, "weights": Modifier, "penalty": Modifier, "targets": TargetModifier, "own loop": object}


def test_the_settings_know_every_name() -> None:
    assert get_args(RecipeName) == tuple(STRATEGIES)
    assert get_args(ModifierName) == tuple(MODIFIERS)
    assert DistilSettings().recipe in STRATEGIES


@pytest.mark.parametrize("name", [*STRATEGIES, *MODIFIERS])
def test_every_entry_tells_source_formula_and_settings(name: str) -> None:
    entry = (STRATEGIES | MODIFIERS)[name]  # type: ignore[operator]
    found = entry.load()
    assert issubclass(found, BASES[entry.kind])
    assert found.source
    assert found.formula
    assert is_dataclass(found.settings_type)
    assert all(isinstance(f.default, (int, float)) for f in fields(found.settings_type))
    assert sys.modules[found.__module__].__doc__


@pytest.mark.parametrize("name", [*STRATEGIES, *MODIFIERS])
def test_the_guide_lists_every_entry_with_its_settings(name: str) -> None:
    rows = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    line = next(line for line in rows if f"`{name}`" in line.split("|")[1])
    found = (STRATEGIES | MODIFIERS)[name].load().settings_type  # type: ignore[operator]
    assert all(f.name in line for f in fields(found) if f.name != "rate")


def test_setting_names_are_unique_among_what_combines() -> None:
    names = [f.name for entry in MODIFIERS.values() for f in fields(entry.load().settings_type)]
    assert len(names) == len(set(names))
    for entry in STRATEGIES.values():
        assert not {f.name for f in fields(entry.load().settings_type)} & set(names)


def test_options_reach_whom_they_belong_to() -> None:
    options = {"rate": 0.5, "pull": 0.25, "crowd_margin": 0.125}
    strategy = make_strategy("roid", ("wisdom-of-crowds",), options)
    (crowd,) = make_modifiers("roid", ("wisdom-of-crowds",), options, ("weights", "penalty"))
    assert isinstance(strategy.settings, Settings)
    assert (strategy.settings.rate, strategy.settings.pull) == (0.5, 0.25)  # type: ignore[attr-defined]
    assert crowd.settings.crowd_margin == 0.125
    both = make_modifiers("roid", ("label-shift", "teacher-weights", "cafa"), {}, ("targets",))
    assert [type(m).__name__ for m in both] == ["TeacherWeights", "LabelShift"], "weights before the correction of the whole"


@pytest.mark.parametrize(
    ("recipe", "modifiers", "options", "what"),
    [
        ("magic", (), {}, "no recipe 'magic'; there are refold"),
        ("roid", ("magic",), {}, "no modifier 'magic'; there are wisdom"),
        ("roid", ("cafa", "cafa"), {}, "name each once"),
        ("refold", ("cafa",), {}, "own loop, which cafa cannot change: it goes with teacher-weights, label-shift"),
        ("cema-paper", ("label-shift",), {}, "goes with no modifier"),
        ("refold", (), {"rate": 1.0}, "has no options"),
        ("refold", ("label-shift",), {"rate": 1.0}, "no option 'rate' for refold with label-shift; there are shift_rounds"),
        ("eata", (), {"pull": 1.0}, "no option 'pull' for eata; there are anchor"),
        ("cotta", (), {"views": 1.5}, "whole number"),
        ("eata", (), {"rate": -1.0}, "0 or more"),
        ("eata", (), {"rate": float("nan")}, "0 or more"),
    ],
)
def test_what_does_not_go_together_is_refused(
    recipe: str, modifiers: tuple[str, ...], options: dict[str, float], what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        check(recipe, modifiers, options)
    with pytest.raises(UsageError, match=r"\[distil\]"):
        DistilSettings.of({"recipe": recipe, "modifiers": modifiers, "options": options})


@pytest.mark.parametrize("recipe", sorted(OWN_LOOPS))
def test_a_recipe_with_a_loop_of_its_own_is_no_strategy_of_the_shared_one(recipe: str) -> None:
    with pytest.raises(UsageError, match="loop of its own"):
        make_strategy(recipe, (), {})


def test_settings_are_checked_without_torch_where_no_options_are_given() -> None:
    code = (
        "import sys; from cloud.distil.settings import DistilSettings;"
        "DistilSettings(recipe='roid', modifiers=('cafa',)); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
