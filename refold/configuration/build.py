"""From gathered values to typed settings, or one sentence: the setting, who gave it, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from refold.configuration.gather import Gathered
from refold.configuration.schema import Path, description_of, fields_of, is_number, may_be_empty, section_of, type_at
from refold.errors import UsageError

__all__ = ["build_settings"]

M = TypeVar("M", bound=BaseModel)


def build_settings(model: type[M], gathered: Gathered) -> M:
    """Validates the whole tree.

    Raises:
        UsageError: the first value that is not allowed.
    """
    _check_values(model, gathered.values, (), gathered)
    try:
        return model.model_validate(gathered.values)
    except ValidationError as e:
        raise UsageError(_sentence(model, gathered, e)) from e
    except UsageError as e:  # a dataclass's own sentence begins with the setting's name
        giver = _giver_in(e.message, gathered)
        raise UsageError(f"{giver}: {e.message}" if giver else e.message, code=e.code) from e


def _check_values(model: type[Any], value: Any, path: Path, gathered: Gathered) -> None:
    """What pydantic lets pass: true for 1, NaN for a number, an empty text for a file."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_values(model, inner, (*path, name), gathered)
        return
    wrong = ""
    annotation = type_at(model, path)
    if isinstance(value, str) and not value.strip() and not may_be_empty(annotation):
        wrong = "it is given and empty, like a variable that was never set; give a value, or leave the setting out"
    elif isinstance(value, bool) and is_number(annotation):
        wrong = "it is a number"
    elif _is_nan(value) and (isinstance(value, float) or is_number(annotation)):
        wrong = "that is no number"
    if wrong:
        raise UsageError(_told(model, path, value, wrong, gathered.giver(path)))


def _is_nan(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower().lstrip("+-") == "nan"
    return isinstance(value, float) and math.isnan(value)


def _sentence(model: type[Any], gathered: Gathered, error: ValidationError) -> str:
    first = error.errors()[0]
    path = _path_in(model, first["loc"])
    same = [e for e in error.errors() if _path_in(model, e["loc"]) == path]
    reasons = list(dict.fromkeys(str(e["msg"]).removeprefix("Value error, ") for e in same))
    value = gathered.values
    for name in path:
        value = value.get(name, first["input"]) if isinstance(value, Mapping) else first["input"]
    where = first["loc"][len(path) :]
    inside = f" (at {'.'.join(map(str, where))})" if where and isinstance(where[0], int) else ""
    if not path or (section_of(type_at(model, path)) is not None and first["type"] == "value_error"):
        givers = ", ".join(dict.fromkeys(map(gathered.giver, gathered.below(path))))
        return f"{givers}: {reasons[0].rstrip('.')}."  # about several settings together
    return _told(model, path, value, " or ".join(reasons) + inside, gathered.giver(path))


def _told(model: type[Any], path: Path, value: object, reason: str, giver: str) -> str:
    about = description_of(model, path)
    about = f" {'.'.join(path)}: {about[0].lower()}{about[1:].rstrip('.')}." if about else ""
    return f"{f'{giver}: ' if giver else ''}{'.'.join(path)} is {value!r}: {reason.rstrip('.')}.{about}"


def _path_in(model: type[Any], loc: tuple[int | str, ...]) -> Path:
    """The setting that an error is about: pydantic's location without the names of a union's members."""
    path: list[str] = []
    section: type[Any] | None = model
    for part in loc:
        if section is None or part not in fields_of(section):
            break
        path.append(str(part))
        section = section_of(fields_of(section)[str(part)])
    return tuple(path)


def _giver_in(message: str, gathered: Gathered) -> str:
    begins = message.split(" ", 1)[0].rstrip(":,.")
    return gathered.giver(tuple(begins.split(".")))
