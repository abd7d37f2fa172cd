"""What both kernels ask of their input before they touch memory by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refold.errors import UsageError
from refold.experts.records import BITS, BLOCK, Matrix, padded

__all__ = ["check_expert", "check_half", "check_input", "check_matrix"]


def check_matrix(m: Matrix) -> None:
    """Raises UsageError where the arrays are not as long as the shape says, or not contiguous."""
    rows, columns = m.shape
    if m.bits not in BITS or m.group < BLOCK or m.group % BLOCK or rows < 1 or columns < 1:
        raise UsageError(f"An expert's matrix of shape {m.shape} with {m.bits} bits in groups of {m.group} does not exist.")
    wide = padded(columns, m.group)
    if m.codes.nbytes != rows * wide * m.bits // 8 or m.scales.nbytes != rows * (wide // m.group) * 2:
        raise UsageError(f"The codes or scales of an expert's matrix of shape {m.shape} have the wrong length.")
    if not (m.codes.flags.c_contiguous and m.scales.flags.c_contiguous):
        raise UsageError("The codes and scales of an expert's matrix must lie in memory without gaps.")


def check_input(x: Tensor, columns: int) -> Tensor:
    """`x`, contiguous. Raises UsageError: not float32 (n, columns) on the CPU."""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != columns or x.device.type != "cpu":
        raise UsageError(
            f"An expert takes float32 (n, {columns}) on the CPU, not {x.dtype} {tuple(x.shape)} on {x.device.type}."
        )
    return x.detach().contiguous()


def check_expert(matrices: Sequence[Matrix], gated: bool) -> tuple[Matrix, Matrix]:
    """Raises UsageError where the two matrices do not fit each other."""
    if len(matrices) != 2:
        raise UsageError(f"An expert has two matrices, not {len(matrices)}.")
    first, second = matrices
    check_matrix(first)
    check_matrix(second)
    if first.shape[0] != (2 if gated else 1) * second.shape[1] or first.shape[1] != second.shape[0]:
        raise UsageError(f"Matrices of shapes {first.shape} and {second.shape} are no expert.")
    return first, second


def check_half(weight: Tensor) -> None:
    """Raises UsageError: not float16 or bfloat16 (rows, columns), contiguous, on the CPU."""
    fits = weight.dtype in (torch.float16, torch.bfloat16) and weight.dim() == 2 and weight.device.type == "cpu"
    if not fits or not weight.is_contiguous():
        raise UsageError(
            f"A 16-bit matrix is float16 or bfloat16 (rows, columns) without gaps on the CPU, not {weight.dtype} "
            f"{tuple(weight.shape)} on {weight.device.type}."
        )
