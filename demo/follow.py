"""Follows a file of JSON lines while another process writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Follower"]


class Follower:
    """Each `read` gives the complete lines that were added since the last one; a file that is not there yet has none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self.damaged = 0  # lines that were not JSON objects

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as f:
                f.seek(self._offset)
                added = f.read()
        except FileNotFoundError:
            return []
        self._offset += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        found = []
        for line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                found.append(value)
            else:
                self.damaged += 1
        return found
