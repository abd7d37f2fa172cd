"""All strategies and modifiers by name. Importing this loads no torch; making one does."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from refold.errors import UsageError

if TYPE_CHECKING:
    from cloud.training.step import Modifier, Strategy, TargetModifier

__all__ = ["CEMA_LOOPS", "MODIFIERS", "OWN_LOOPS", "STRATEGIES", "Entry", "check", "make_modifiers", "make_strategy"]

HERE = "cloud.training.strategies"


@dataclass(frozen=True)
class Entry:
    """Where a strategy or modifier is defined, and what it is.

    Attributes:
        where: module and class, "module:Class".
        kind: "loss" (a strategy for the shared loop), "own loop"; of modifiers "weights", "penalty" or "targets".
    """

    where: str
    kind: str

    def load(self) -> Any:
        module, _, name = self.where.partition(":")
        return getattr(importlib.import_module(module), name)


STRATEGIES: Mapping[str, Entry] = {
    "refold": Entry(f"{HERE}.recipes:Refold", "own loop"),
    "cema-paper": Entry(f"{HERE}.recipes:CemaPaper", "own loop"),
    "cema-released": Entry(f"{HERE}.recipes:CemaReleased", "own loop"),
    "distillation": Entry(f"{HERE}.distillation:Distillation", "loss"),
    "cema": Entry(f"{HERE}.cema:Cema", "loss"),
    "eata": Entry(f"{HERE}.eata:Eata", "loss"),
    "cotta": Entry(f"{HERE}.cotta:Cotta", "loss"),
    "rmt": Entry(f"{HERE}.rmt:Rmt", "loss"),
    "petal": Entry(f"{HERE}.petal:Petal", "loss"),
    "sar": Entry(f"{HERE}.sar:Sar", "loss"),
    "roid": Entry(f"{HERE}.roid:Roid", "loss"),
}
OWN_LOOPS = frozenset(name for name, entry in STRATEGIES.items() if entry.kind == "own loop")
CEMA_LOOPS = OWN_LOOPS - {"refold"}
MODIFIERS: Mapping[str, Entry] = {
    "wisdom-of-crowds": Entry(f"{HERE}.modifiers.wisdom:WisdomOfCrowds", "weights"),
    "entropy-band": Entry(f"{HERE}.modifiers.entropy_band:EntropyBand", "weights"),
    "redundancy": Entry(f"{HERE}.modifiers.redundancy:Redundancy", "weights"),
    "teachers": Entry(f"{HERE}.modifiers.teachers:TeacherTerm", "penalty"),
    "cafa": Entry(f"{HERE}.modifiers.cafa:Cafa", "penalty"),
    "teacher-weights": Entry(f"{HERE}.modifiers.teacher_weights:TeacherWeights", "targets"),
    "label-shift": Entry(f"{HERE}.modifiers.label_shift:LabelShift", "targets"),
}


def check(recipe: str, modifiers: Sequence[str], options: Mapping[str, float]) -> None:
    """Whether these go together. Loads torch only where options are given.

    Raises:
        UsageError: an unknown name, a modifier that the recipe's own loop cannot use, a modifier named twice, or an option that
            neither the recipe nor one of the modifiers has, or that has another type.
    """
    _known(recipe, STRATEGIES, "recipe")
    for name in modifiers:
        _known(name, MODIFIERS, "modifier")
    if len(set(modifiers)) < len(modifiers):
        raise UsageError(f"The modifiers {', '.join(modifiers)} name one twice: name each once.")
    if recipe in OWN_LOOPS:
        usable = [n for n, entry in MODIFIERS.items() if recipe == "refold" and entry.kind == "targets"]
        barred = [n for n in modifiers if n not in usable]
        if barred:
            others = f"it goes with {', '.join(usable)}" if usable else "it goes with no modifier"
            raise UsageError(f"The recipe {recipe} trains in its own loop, which {barred[0]} cannot change: {others}.")
        if options and not modifiers:
            raise UsageError(f"The recipe {recipe} has no options: its settings are in [distil] itself.")
    if options:
        _shared_out(recipe, modifiers, options)


def make_strategy(recipe: str, modifiers: Sequence[str], options: Mapping[str, float]) -> Strategy[Any]:
    """A fresh strategy for the shared loop, with its share of the options. Raises UsageError as `check` does."""
    check(recipe, modifiers, options)
    entry = STRATEGIES[recipe]
    if entry.kind != "loss":
        raise UsageError(f"The recipe {recipe} trains in a loop of its own.")
    made: Strategy[Any] = _make(entry, _shared_out(recipe, modifiers, options)[recipe])
    return made


def make_modifiers(
    recipe: str, modifiers: Sequence[str], options: Mapping[str, float], kinds: Iterable[str]
) -> list[Modifier[Any] | TargetModifier[Any]]:
    """Fresh modifiers of these kinds, in the registry's order. Raises UsageError as `check` does."""
    check(recipe, modifiers, options)
    shares = _shared_out(recipe, modifiers, options)
    return [_make(entry, shares[name]) for name, entry in MODIFIERS.items() if name in modifiers and entry.kind in set(kinds)]


def _known(name: str, table: Mapping[str, Entry], what: str) -> None:
    if name not in table:
        raise UsageError(f"There is no {what} {name!r}; there are {', '.join(table)}.")


def _make(entry: Entry, values: Mapping[str, float]) -> Any:
    made = entry.load()
    return made(made.settings_type(**values))


def _shared_out(recipe: str, modifiers: Sequence[str], options: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Each option to whom it belongs; setting names are unique among a recipe and the modifiers."""
    owners = {name: STRATEGIES.get(name) or MODIFIERS[name] for name in (recipe, *modifiers)}
    shares: dict[str, dict[str, float]] = {name: {} for name in owners}
    if not options:
        return shares
    has = {name: {f.name: f.default for f in fields(entry.load().settings_type)} for name, entry in owners.items()}
    for option, value in options.items():
        owner = next((name for name in owners if option in has[name]), None)
        if owner is None:
            names = sorted({n for settings in has.values() for n in settings})
            raise UsageError(f"There is no option {option!r} for {' with '.join(owners)}; there are {', '.join(names)}.")
        if not 0 <= value < float("inf"):
            raise UsageError(f"The option {option} must be 0 or more, not {value}.")
        if isinstance(has[owner][option], int) and value != int(value):
            raise UsageError(f"The option {option} is a whole number, not {value}.")
        shares[owner][option] = int(value) if isinstance(has[owner][option], int) else float(value)
    return shares
