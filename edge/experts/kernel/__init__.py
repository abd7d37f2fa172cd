"""The arithmetic of one expert, straight from its packed record, without a copy of the weights (docs/adr/012-expert-kernel.md).

    expert.c, dot_*.h   the native kernel: AVX2, NEON or plain C, whatever the compiler finds
    build.py            compiles it on first use into a folder of the user's cache
    native.py           calls it on the record's own memory, with the interpreter's lock released
    portable.py         the same arithmetic in torch, where there is no C compiler
    crew.py             threads that share the experts of a layer and the rows of a matrix

Both quantise their input per block of 32 to int8, as llama.cpp's Q8_0 does, and multiply by the exact weights that
`refold.experts.dequantise` gives. What one token yields does not depend on the tokens beside it or on which records are cached;
natively it does not depend on the number of threads either.

`name` says which is in use: "native-avx2", "native-neon", "native-plain" or "torch". The environment variable REFOLD_KERNEL
forces "native" or "torch".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Protocol, TypeVar

from refold.errors import UsageError
from refold.experts.records import Matrix

if TYPE_CHECKING:
    from torch import Tensor

    from edge.experts.kernel.crew import Crew

__all__ = ["Kernel", "choose", "each", "expert", "half", "is_native", "kernel", "linear", "name"]

T = TypeVar("T")
SHARE = 1 << 19  # weights of one thread, a tenth of a millisecond: fewer do not pay for waking it
name: str
_choosing = Lock()
_in_use: Kernel | None = None


class Kernel(Protocol):
    """What `native.Native` and the module `portable` have in common."""

    name: str

    def linear(self, matrix: Matrix, x: Tensor) -> Tensor: ...

    def half(self, weight: Tensor, x: Tensor) -> Tensor: ...

    def expert(self, matrices: Sequence[Matrix], x: Tensor, gated: bool, activation: str) -> Tensor: ...


def expert(matrices: Sequence[Matrix], x: Tensor, gated: bool, activation: str) -> Tensor:
    """The feed-forward of one expert: down(act(gate x) * up x), or down(act(up x)) where it is not gated.

    Args:
        matrices: as `refold.experts.decode` gives them: gate_up (2 intermediate, hidden), gate rows first, or up
            (intermediate, hidden); then down (hidden, intermediate).
        x: float32 (n, hidden), on the CPU.
        activation: transformers' name of it.

    Returns:
        float32 (n, hidden).

    Raises:
        UsageError: shapes or types that do not fit, an unknown activation, or a forced kernel that cannot be built.
    """
    return kernel().expert(matrices, x, gated, activation)


def linear(matrix: Matrix, x: Tensor) -> Tensor:
    """float32 (n, rows) = `x` (n, columns) times the transpose of the matrix. Raises UsageError as `expert` does."""
    return kernel().linear(matrix, x)


def half(weight: Tensor, x: Tensor, crew: Crew | None = None) -> Tensor:
    """The same with 16-bit weights that are no expert's: each is widened as it is multiplied, `x` is not rounded.

    Args:
        weight: float16 or bfloat16 (rows, columns), contiguous, on the CPU. x: float32 (n, columns).
        crew: threads that share out the rows; None: the caller alone. The results are the same bits.

    Returns:
        float32 (n, rows); natively, a token's does not depend on the tokens beside it.

    Raises:
        UsageError: shapes or types that do not fit.
    """
    chosen = kernel()
    shares = min(crew.threads, weight.numel() // SHARE) if crew is not None and is_native() else 1
    if crew is None or shares < 2:
        return chosen.half(weight, x)
    import torch

    parts: dict[int, Tensor] = {}

    def one(known: tuple[int, Tensor]) -> None:
        place, rows = known
        parts[place] = chosen.half(rows, x)

    crew.each(one, enumerate(weight.chunk(shares)))
    return torch.cat([parts[place] for place in range(len(parts))], 1)


def each(work: Callable[[T], None], items: Iterable[T], crew: Crew | None = None) -> None:
    """`work` on every item, by the crew's threads where the kernel is the compiled one: torch's divides its own work.

    Raises:
        Whatever `work` raised first.
    """
    if crew is not None and is_native():
        crew.each(work, items)
        return
    for item in items:
        work(item)


def kernel() -> Kernel:
    """The kernel in use, chosen and built when first asked for."""
    global _in_use
    if _in_use is None:
        with _choosing:
            _in_use = _in_use or choose(os.environ.get("REFOLD_KERNEL", ""))
    return _in_use


def is_native() -> bool:
    """Whether the compiled kernel is in use."""
    return kernel().name.startswith("native")


def choose(forced: str) -> Kernel:
    """What REFOLD_KERNEL=`forced` means. Raises UsageError: an unknown value, or "native" where it cannot be built."""
    if forced not in ("", "native", "torch"):
        raise UsageError(f"REFOLD_KERNEL is native, torch or not set, not {forced!r}.")
    from edge.experts.kernel import native, portable

    if forced == "torch":
        return portable.PORTABLE
    try:
        return native.Native()
    except native.UnavailableError as e:
        if forced:
            raise UsageError(f"The native kernel was asked for and cannot be used: {e}") from e
        return portable.PORTABLE


def __getattr__(attribute: str) -> str:
    if attribute == "name":
        return kernel().name
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
