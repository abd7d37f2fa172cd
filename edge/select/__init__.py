"""Which frames are worth uploading: one judgement per frame, numpy only, microseconds each.

    selector = make_selector("budget", class_count=10, settings={"rate": 0.05})
    verdict = selector.judge(probs)             probs: float32 (C,), softmax of the served logits
    verdict.keep, verdict.score, verdict.entropy, verdict.reason, verdict.unbiased

    cema-paper      entropy band whose upper end follows the mean entropy         edge/select/cema.py
    cema-released   fixed upper end and a redundancy test of 0.05                 edge/select/cema.py
    eata            the same with a redundancy bound that fits the class count    edge/select/eata.py
    budget          best scores within a rate, plus an unbiased random share      edge/select/budget.py

    NewDomainSelector wraps any of them: more uploads of a new domain     edge/select/new_domain.py

`BudgetSelector.set_rate(uploads_per_frame)` follows a changing byte budget; `rate_within` derives it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from edge.select.budget import Budget, BudgetSelector, rate_within, room
from edge.select.cema import CemaPaper, CemaPaperSelector, CemaReleased, cema_released
from edge.select.eata import Eata, EataSelector
from edge.select.new_domain import NewDomain, NewDomainSelector, innermost
from edge.select.verdict import Probabilities, Selector, Verdict, entropy_of
from refold.errors import UsageError

__all__ = [
    "SELECTORS",
    "Budget",
    "BudgetSelector",
    "CemaPaper",
    "CemaPaperSelector",
    "CemaReleased",
    "Eata",
    "EataSelector",
    "NewDomain",
    "NewDomainSelector",
    "Probabilities",
    "Selector",
    "Verdict",
    "entropy_of",
    "innermost",
    "make_selector",
    "rate_within",
    "room",
]

SELECTORS: dict[str, tuple[type[Any], Callable[[Any, int], Selector]]] = {
    "cema-paper": (CemaPaper, CemaPaperSelector),
    "cema-released": (CemaReleased, cema_released),
    "eata": (Eata, EataSelector),
    "budget": (Budget, BudgetSelector),
}


def make_selector(name: str, class_count: int, settings: Mapping[str, object] | object | None = None) -> Selector:
    """Makes a selector by name.

    Args:
        class_count: C, at least 2.
        settings: the selector's frozen dataclass, a mapping of its fields, or None for the defaults.

    Raises:
        UsageError: unknown name or field, or a value out of range.
    """
    if name not in SELECTORS:
        raise UsageError(f"There is no selector {name!r}; choose one of: {', '.join(SELECTORS)}.")
    if class_count < 2:
        raise UsageError(f"Selecting by entropy needs at least two classes; this model has {class_count}.")
    kind, make = SELECTORS[name]
    if not isinstance(settings, kind):
        settings = _from_mapping(name, kind, settings or {})
    return make(settings, class_count)


def _from_mapping(name: str, kind: type[Any], values: object) -> object:
    known = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(values, Mapping):
        raise UsageError(f"The settings of selector {name!r} are of type {type(values).__name__}; give {kind.__name__}.")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"Selector {name!r} has no setting {unknown[0]!r}; it has: {', '.join(known)}.")
    hints = get_type_hints(kind)
    numbers: dict[str, object] = {}
    for key, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
            raise UsageError(f"{key} of selector {name!r} must be a number, not {value!r}.")
        if hints[key] is int and isinstance(value, float):
            if not value.is_integer():
                raise UsageError(f"{key} of selector {name!r} must be a whole number, not {value!r}.")
            value = int(value)
        numbers[key] = value
    try:
        return kind(**numbers)
    except TypeError as e:
        raise UsageError(f"A setting of selector {name!r} has the wrong type: {', '.join(known)} are numbers.") from e
