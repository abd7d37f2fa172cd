"""The compiled kernel, called on the record's own memory. ctypes releases the interpreter's lock for the time of a call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edge.experts.kernel.build import UnavailableError, library
from edge.experts.kernel.checks import check_expert, check_half, check_input, check_matrix
from edge.experts.kernel.portable import PORTABLE, activated
from refold.errors import RefoldError
from refold.experts.records import BITS, Matrix, quantise

__all__ = ["Native", "UnavailableError"]

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
APART = 1e-5  # of the largest output, between this kernel and the portable one, at its self-check


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class Native:
    """Raises UnavailableError where it cannot be built, does not load or computes something else than the portable kernel."""

    def __init__(self) -> None:
        path = library()
        try:
            self._library = ctypes.CDLL(str(path))
            told = self._library.refold_kernel_name
            self._linear, self._expert = self._library.refold_linear, self._library.refold_expert
            self._half = self._library.refold_half
        except (OSError, AttributeError) as e:
            raise UnavailableError(f"{path} does not load ({e}). Remove it, and it is made again.") from e
        matrix, pointer = ctypes.POINTER(_Matrix), ctypes.c_void_p
        told.restype = ctypes.c_char_p
        self._linear.argtypes = [matrix, pointer, ctypes.c_int64, pointer]
        self._expert.argtypes = [matrix, matrix, ctypes.c_int, ctypes.c_int, pointer, ctypes.c_int64, pointer]
        self._half.argtypes = [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, pointer, ctypes.c_int64, pointer]
        self._half.restype = None
        self.name = "native-" + told().decode()
        self._check()

    def linear(self, matrix: Matrix, x: Tensor) -> Tensor:
        check_matrix(matrix)
        x = check_input(x, matrix.shape[1])
        n = x.shape[0]
        out = torch.empty(n, matrix.shape[0])
        if n and self._linear(_view(matrix), x.data_ptr(), n, out.data_ptr()):
            raise _no_memory()
        return out

    def half(self, weight: Tensor, x: Tensor) -> Tensor:
        check_half(weight)
        x = check_input(x, weight.shape[1])
        out = torch.empty(len(x), len(weight))
        brain = weight.dtype == torch.bfloat16
        self._half(weight.data_ptr(), brain, *weight.shape, x.data_ptr(), len(x), out.data_ptr())
        return out

    def expert(self, matrices: Sequence[Matrix], x: Tensor, gated: bool, activation: str) -> Tensor:
        first, second = check_expert(matrices, gated)
        which = ACTIVATIONS.get(activation)
        if which is None:
            return self.linear(second, activated(self.linear(first, x), gated, activation))
        x = check_input(x, first.shape[1])
        n, out = x.shape[0], torch.empty_like(x)
        if n and self._expert(_view(first), _view(second), gated, which, x.data_ptr(), n, out.data_ptr()):
            raise _no_memory()
        return out

    def _check(self) -> None:
        """A compiler may be broken: no wrong token is worth its speed."""
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.standard_normal((5, 300), np.float32))
        for dtype in (torch.float16, torch.bfloat16):
            weight = torch.from_numpy(rng.standard_normal((3, 300), np.float32)).to(dtype)
            ours, theirs = self.half(weight, x), PORTABLE.half(weight, x)
            if not bool((ours - theirs).abs().max() <= APART * theirs.abs().max()):
                raise UnavailableError(
                    f"compiled for this machine it computes something else in {dtype}. Try another compiler."
                )
        for bits in BITS:
            matrix = quantise(rng.standard_normal((3, 300), np.float32), bits, 64)
            ours, theirs = self.linear(matrix, x), PORTABLE.linear(matrix, x)
            if not bool((ours - theirs).abs().max() <= APART * theirs.abs().max()):
                raise UnavailableError(
                    f"compiled for this machine it computes something else at {bits} bits. Try another compiler."
                )


def _view(m: Matrix) -> _Matrix:
    codes, scales = m.codes.__array_interface__["data"][0], m.scales.__array_interface__["data"][0]
    return _Matrix(codes, scales, m.shape[0], m.shape[1], m.bits, m.group)


def _no_memory() -> RefoldError:
    return RefoldError("There is no memory left to compute an expert in: lower --memory.", code="memory")
