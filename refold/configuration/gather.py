"""File, environment and flags, later ones winning, in one tree of values that remembers who gave each of them."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from refold.configuration.schema import Path, entry_of, fields_of, holds_names, leaves, parse_text, section_of, type_at
from refold.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Gathered", "Sources", "read_toml"]

log = logging.getLogger(__name__)
# What Kubernetes puts into every container of a namespace for a Service called refold-edge or refold-cloud:
# https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
KUBERNETES = re.compile(r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")


@dataclass
class Gathered:
    """Values as nested tables, and for each path that was given what gave it: a file's name, a variable, a flag."""

    values: dict[str, Any] = field(default_factory=dict)
    givers: dict[Path, str] = field(default_factory=dict)

    def giver(self, path: Path) -> str:
        """Who gave the value at `path`, or the table around it; empty when nobody did."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.givers:
                return self.givers[path[:length]]
        return ""

    def below(self, path: Path) -> Iterator[Path]:
        """Every path that was given at or below `path`."""
        return (given for given in self.givers if given[: len(path)] == path)

    def put(self, path: Path, value: Any, giver: str) -> None:
        """Sets one value; a table is merged name by name."""
        if isinstance(value, Mapping):
            for name, inner in value.items():
                self.put((*path, str(name)), inner, giver)
            if not value:
                self._table(path[:-1], giver).setdefault(path[-1], {})
                self.givers.setdefault(path, giver)
            return
        for given in list(self.below(path)):
            del self.givers[given]
        self._table(path[:-1], giver)[path[-1]] = value
        self.givers[path] = giver

    def _table(self, path: Path, giver: str) -> dict[str, Any]:
        table = self.values
        for depth, name in enumerate(path):
            inner = table.setdefault(name, {})
            if not isinstance(inner, dict):
                where = ".".join(path[: depth + 1])
                raise UsageError(f"{giver}: {where} was given as one value by {self.giver(path[: depth + 1])}, not as a table.")
            table = inner
        return table


class Sources:
    """Takes what file, environment and flags say about the settings of `model`; refuses names that are not there.

    Args:
        model: the outermost section.
        prefix: of environment variables, such as REFOLD_EDGE_. The names of a path follow, joined by two underscores.

    Raises (from every method):
        UsageError: an unknown name, with the nearest known one; a value where a table belongs.
    """

    def __init__(self, model: type[Any], prefix: str) -> None:
        self._model, self._prefix = model, prefix
        self.gathered = Gathered()

    def file(self, values: Mapping[str, Any], name: str) -> None:
        """A parsed TOML file."""
        self._check(values, self._model, (), name)
        for key, value in values.items():
            self.gathered.put((key,), value, name)

    def environment(self, environment: Mapping[str, str]) -> None:
        """Variables with the prefix: REFOLD_EDGE_SOURCE__FPS=5 is source.fps."""
        foreign = []
        for variable, text in sorted(environment.items()):
            rest = variable.removeprefix(self._prefix)
            if rest == variable or not rest:
                continue
            path = tuple(rest.lower().split("__"))
            if not self._known(path) and (KUBERNETES.fullmatch(rest) or KUBERNETES_PORT.match(text)):
                foreign.append(variable)
                continue
            self._text(path, text, variable)
        if foreign:
            log.warning("No settings, and not used: %s. Kubernetes sets such variables for a Service.", ", ".join(foreign))

    def flags(self, values: Mapping[str, Any], names: Mapping[Path, str] | None = None, path: Path = ()) -> None:
        """Values of a command line, nested as in the file; None was not given. `names`: the flag of each path."""
        for key, value in values.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                self.flags(value, names, here)
            elif value is not None:
                giver = (names or {}).get(here, "command line")
                self._check_path(here, giver)
                self.gathered.put(here, value, giver)

    def assignments(self, texts: Sequence[str], flag: str = "--set") -> None:
        """`section.name=value`, as a general flag gives them."""
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"{flag} {text}: write SECTION.NAME=VALUE, for example {flag} {self._example()}=VALUE.")
            self._text(tuple(name.strip().split(".")), value, f"{flag} {name.strip()}")

    def _text(self, path: Path, text: str, giver: str) -> None:
        self._check_path(path, giver)
        annotation = type_at(self._model, path)
        value = parse_text(text, annotation)
        self._check(value, annotation, path, giver)
        self.gathered.put(path, value, giver)

    def _known(self, path: Path) -> bool:
        try:
            type_at(self._model, path)
        except KeyError:
            return False
        return True

    def _check_path(self, path: Path, giver: str) -> None:
        for depth in range(len(path)):
            try:
                outer = type_at(self._model, path[:depth])
            except KeyError:
                break
            section = section_of(outer)
            if section is not None:
                self._check_name(path[depth], section, path[:depth], giver)
        if not self._known(path):
            raise UsageError(f"{giver}: {'.'.join(path[:-1])} is not a table with a {path[-1]} in it; give it as a whole.")

    def _check(self, value: Any, annotation: Any, path: Path, giver: str) -> None:
        """Names of a section's settings, at every depth and in every table of a list."""
        entry = entry_of(annotation)
        if entry is not None and isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                self._check(inner, entry, (*path, str(i)), giver)
        section = section_of(annotation)
        if section is None:
            return
        where = ".".join(path)
        if not isinstance(value, Mapping):
            raise UsageError(f"{giver}: {where} is a section: write [{where}] and its settings below.")
        for name, inner in value.items():
            self._check_name(name, section, path, giver)
            self._check(inner, fields_of(section)[name], (*path, name), giver)

    def _check_name(self, name: str, section: type[Any], path: Path, giver: str) -> None:
        fields = fields_of(section)
        known = list(fields)
        if name in known:
            return
        near = difflib.get_close_matches(name, known, 1)
        variable = self._nearest_variable(giver) if giver.startswith(self._prefix) else None
        joined = next((k for k, kind in fields.items() if name.startswith(k + "_") and holds_names(kind)), None)
        if joined and giver.startswith(self._prefix):
            right = self._variable((*path, joined, name[len(joined) + 1 :]))
            hint = f"did you mean {right}, with two underscores?"
        elif variable and self._variable(variable) != giver:
            hint = f"did you mean {'.'.join(variable)} ({self._variable(variable)})?"
        elif near:
            hint = f"did you mean {'.'.join((*path, near[0]))}?"
        else:
            hint = f"known are: {', '.join(known)}."
        raise UsageError(f"{giver}: there is no setting {'.'.join((*path, name))}; {hint}")

    def _nearest_variable(self, variable: str) -> Path | None:
        known = {self._variable(path): path for path, _ in leaves(self._model)}
        near = difflib.get_close_matches(variable.upper(), known, 1, 0.85)
        return known[near[0]] if near else None

    def _variable(self, path: Path) -> str:
        return self._prefix + "__".join(path).upper()

    def _example(self) -> str:
        return ".".join(next((path for path, _ in leaves(self._model) if len(path) > 1), ("name",)))


def read_toml(path: FilePath) -> dict[str, Any]:
    """Raises UsageError when the file cannot be read or is not TOML; FileNotFoundError is the caller's to explain."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as e:
        raise UsageError(f"The configuration {path} cannot be read: {e.strerror or e}.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not TOML: {e}.") from e
