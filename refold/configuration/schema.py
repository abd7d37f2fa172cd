"""The tree of settings that a pydantic model or dataclass describes, and how a text becomes a value of a setting's type.

A section is a pydantic model or a dataclass; everything else is a leaf. A leaf of type `dict` is an open table: any name may
stand in it.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

__all__ = [
    "NotEmpty",
    "Path",
    "description_of",
    "entry_of",
    "fields_of",
    "holds_names",
    "is_number",
    "leaves",
    "may_be_empty",
    "members",
    "parse_text",
    "section_of",
    "type_at",
]

Path = tuple[str, ...]


class NotEmpty:
    """Of a setting whose default is empty: one that is given is not.

    An empty text comes from a variable that was never set, `CA="$FLEET_CA"`. Taken for "not given", it would switch a
    protection off in silence.
    """


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type without None: `int | None` is (int,), `Annotated[float, ...]` is (float,)."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(m for part in get_args(annotation) if part is not type(None) for m in members(part))
    return (annotation,)


def section_of(annotation: Any) -> type[Any] | None:
    """The model or dataclass behind an annotation; None for a leaf."""
    for member in members(annotation):
        if isinstance(member, type) and (issubclass(member, BaseModel) or dataclasses.is_dataclass(member)):
            return member
    return None


def _annotated(annotation: Any, metadata: Sequence[Any]) -> Any:
    for entry in metadata:
        annotation = Annotated[annotation, entry]
    return annotation


def fields_of(section: type[Any]) -> dict[str, Any]:
    """Name and annotation of each setting of a section."""
    if issubclass(section, BaseModel):
        return {
            name: _annotated(field.annotation, field.metadata) if field.metadata else field.annotation
            for name, field in section.model_fields.items()
        }
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section) if field.init}


def type_at(section: type[Any], path: Path) -> Any:
    """The annotation at a path; of names inside an open table the table's value type. Raises KeyError where nothing is."""
    annotation: Any = section
    for name in path:
        inner = section_of(annotation)
        if inner is not None:
            annotation = fields_of(inner)[name]
        elif table := _table_of(annotation):
            annotation = (get_args(table) or (str, Any))[1]
        elif annotation is Any:  # inside an open table of anything
            continue
        else:
            raise KeyError(name)
    return annotation


def leaves(section: type[Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, annotation) of every setting that is no section, in the order of definition."""
    for name, annotation in fields_of(section).items():
        inner = section_of(annotation)
        if inner is None:
            yield (*path, name), annotation
        else:
            yield from leaves(inner, (*path, name))


def description_of(section: type[Any], path: Path) -> str:
    """What a setting's definition says of it; empty where it says nothing there."""
    for name in path[:-1]:
        inner = section_of(fields_of(section).get(name))
        if inner is None:
            return ""
        section = inner
    if path and issubclass(section, BaseModel) and path[-1] in section.model_fields:
        return section.model_fields[path[-1]].description or ""
    return ""


def entry_of(annotation: Any) -> type[Any] | None:
    """The section that each entry of a list is; None where entries are no sections."""
    for kind in members(annotation):
        if _is_list(kind) and get_args(kind):
            return section_of(get_args(kind)[0])
    return None


def may_be_empty(annotation: Any) -> bool:
    """False where `NotEmpty` stands among a type's annotations."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return not any(isinstance(m, NotEmpty) for m in metadata) and may_be_empty(inner)
    if get_origin(annotation) in (Union, types.UnionType):
        return all(may_be_empty(part) for part in get_args(annotation))
    return True


def is_number(annotation: Any) -> bool:
    """Whether a leaf takes numbers and no truth values."""
    kinds = members(annotation)
    return any(k in (int, float) for k in kinds) and bool not in kinds


def holds_names(annotation: Any) -> bool:
    """Whether names stand below a setting: a section or an open table."""
    return section_of(annotation) is not None or _table_of(annotation) is not None


def parse_text(text: str, annotation: Any) -> Any:
    """A variable's or flag's text as a value for `annotation`; what is no such value is left to the validation to refuse.

    Numbers and truth values may be left as text, which pydantic reads. Lists are JSON or separated by commas, tables are JSON.
    """
    kinds = members(annotation)
    if _table_of(annotation) or section_of(annotation):
        return _json(text)
    if any(_is_list(k) for k in kinds):
        return _json(text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",") if part.strip()]
    if Any in kinds:
        return _json(text)
    bare = text.strip()
    if int in kinds and float in kinds:  # pydantic would make every text of digits a float
        for kind in (int, float):
            try:
                return kind(bare)
            except ValueError:
                continue
    if str not in kinds and any(k in (int, float, bool) or get_origin(k) is Literal for k in kinds):
        text = bare
    if len(bare) >= 2 and bare[0] == bare[-1] == '"':
        unquoted = _json(bare)
        return unquoted if isinstance(unquoted, str) else text
    return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _table_of(annotation: Any) -> Any:
    return next((k for k in members(annotation) if k in (dict, Mapping) or get_origin(k) in (dict, Mapping)), None)


def _is_list(kind: Any) -> bool:
    return kind in (list, tuple) or get_origin(kind) in (list, tuple)
