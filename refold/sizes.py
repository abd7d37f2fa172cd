"""Bytes as people write them."""

from __future__ import annotations

import re

from refold.errors import UsageError

__all__ = ["parse_size"]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in `60KB`, `1.5 MB`, `512MiB` or `4096`. Raises UsageError."""
    match = SIZE.match(text)
    if match is None or match[2].upper() not in UNITS:
        raise UsageError(f"{text!r} is no size: write 60KB, 1.5MB, 512MiB or a number of bytes.")
    return int(float(match[1]) * UNITS[match[2].upper()])
