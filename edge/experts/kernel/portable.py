"""The native kernel's arithmetic in torch: the same int8 input, the same weights, other last bits of the sums.

Tokens go through in tiles of sixteen, short ones filled with zeros, so that a token meets the same matrix product alone and in
a crowd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edge.experts.kernel.checks import check_expert, check_half, check_input, check_matrix
from refold.errors import UsageError
from refold.experts.records import BLOCK, CENTRE, Matrix, padded

__all__ = ["PORTABLE", "Portable", "activated", "as_int8", "weights"]

TILE = 16
FULL = 64  # floats: whole registers of any processor
ROWS = 128  # unpacked at a time: a megabyte of 2,048 columns, which the caches hold
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def activated(h: Tensor, gated: bool, name: str) -> Tensor:
    """act(gate) * up of `h` = (n, gate and up beside each other), or act(h). Raises UsageError: an unknown activation.

    Rows are filled up to whole vector registers, as what torch does with the rest of an array differs in the last bits.
    """
    function = activation_named(name)
    gate, up = h.chunk(2, 1) if gated else (h, None)
    columns = gate.shape[1]
    out = function(functional.pad(gate, (0, -columns % FULL)).contiguous())[:, :columns]
    return out if up is None else out * up


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """By transformers' names. Raises UsageError: there is none."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    try:
        from transformers.activations import ACT2FN

        found: Callable[[Tensor], Tensor] = ACT2FN[name]
    except (ImportError, KeyError) as e:
        raise UsageError(f"There is no activation {name!r}.") from e
    return found


def as_int8(x: Tensor, group: int) -> Tensor:
    """`x` (n, columns) as the kernels see it: per block of 32, whole multiples of largest / 127, of which 127 at most.

    Returns:
        float32 (n, columns padded to the group). A block with a value that is not finite becomes NaN.
    """
    n, columns = x.shape
    wide = functional.pad(x, (0, padded(columns, group) - columns)).reshape(n, padded(columns, group) // BLOCK, BLOCK)
    most = wide.abs().amax(2, keepdim=True)
    some = most > 1e-30
    inverse = torch.where(some, torch.tensor(127.0) / most, 0.0)  # a number before the stroke: torch multiplies by 1 / most
    scale = torch.where(torch.isfinite(most), torch.where(some, most / 127.0, 0.0), torch.nan)
    return (torch.round(wide * inverse) * scale).flatten(1)


def weights(m: Matrix, start: int = 0, stop: int | None = None) -> Tensor:
    """float32 (rows, padded columns) of the rows from `start` to `stop`: what `refold.experts.dequantise` gives."""
    packed, per = m.codes[start:stop], 8 // m.bits
    rows = len(packed)
    if m.bits == 8:
        levels = packed.view(np.int8).astype(np.float32)
    else:
        codes = packed.reshape(rows, -1, BLOCK // per)
        levels = np.empty((rows, codes.shape[1], per, BLOCK // per), np.float32)
        centre, mask = np.float32(CENTRE[m.bits]), np.uint8((1 << m.bits) - 1)
        for k in range(per):
            np.subtract((codes >> np.uint8(k * m.bits)) & mask, centre, out=levels[:, :, k], dtype=np.float32)
    grouped = levels.reshape(rows, -1, m.group)
    grouped *= m.scales[start:stop].astype(np.float32)[..., None]
    return torch.from_numpy(grouped.reshape(rows, -1))


class Portable:
    """The kernel where there is no compiler."""

    name = "torch"

    @torch.no_grad()
    def linear(self, matrix: Matrix, x: Tensor) -> Tensor:
        check_matrix(matrix)
        return _linear(matrix, check_input(x, matrix.shape[1]))

    @torch.no_grad()
    def half(self, weight: Tensor, x: Tensor) -> Tensor:
        """What the native one is checked with; no model runs on it."""
        check_half(weight)
        return check_input(x, weight.shape[1]) @ weight.float().T

    @torch.no_grad()
    def expert(self, matrices: Sequence[Matrix], x: Tensor, gated: bool, activation: str) -> Tensor:
        first, second = check_expert(matrices, gated)
        h = _linear(first, check_input(x, first.shape[1]))
        return _linear(second, activated(h, gated, activation))


def _linear(m: Matrix, x: Tensor) -> Tensor:
    n, q = len(x), as_int8(x, m.group)
    tiles = [tile.clone() for tile in torch.split(functional.pad(q, (0, 0, 0, -n % TILE)), TILE)] if n else []
    out = x.new_empty(len(tiles) * TILE, m.shape[0])
    for row in range(0, m.shape[0], ROWS):
        w = weights(m, row, row + ROWS)
        for i, tile in enumerate(tiles):
            out[i * TILE : (i + 1) * TILE, row : row + ROWS] = functional.linear(tile, w)
    return out[:n]


PORTABLE = Portable()
