"""Where a window ends, in numbers that both writers need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ceil_pads"]


def ceil_pads(size: Sequence[int], out: Sequence[int], a: Mapping[str, Any]) -> list[int]:
    """Pads (top, left, bottom, right) with which a VALID window gives exactly the output size; cropping is never needed.

    Args:
        size, out: (height, width). a: a node's kernel, strides and pads.
    """
    kernel, strides, pads = a["kernel"], a["strides"], a["pads"]
    after = [max((out[i] - 1) * strides[i] + kernel[i] - size[i] - pads[i], 0) for i in range(2)]
    return [*pads[:2], *after]
