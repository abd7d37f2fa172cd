"""One expert's matrix times one token and times many: Refold's kernels against torch's own ways, in one process, in turn.

Weights of 2,048 x 1,024 (OLMoE's down projection). For one token every repetition takes another copy of the matrix, 96 MB of
copies in turn, as a pager's cache does: what is measured is memory, not the third-level cache. `ratio` is the baseline's time
over the kernel's, the median of pairs.

    fp32        torch.nn.functional.linear on float32 weights that are there already
    unpack      refold.experts.dequantise, then the same
    int8pack    torch._weight_int8pack_mm: bfloat16 input, int8 weights with a scale per row, no groups
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.paired import paired
from bench.result import Cell, Claim, Options, Result, number, progress
from edge.experts import kernel
from edge.experts.kernel import Kernel
from edge.experts.kernel.portable import PORTABLE
from refold.experts import BITS, Matrix, dequantise, quantise

__all__ = ["claims", "plot", "run"]

ROWS, COLUMNS, GROUP = 2048, 1024, 64
APART = 96 << 20  # bytes of copies: three times the largest third-level cache of a small machine
TOKENS = (1, 4, 16, 64, 256)


def run(options: Options) -> Result:
    """Full: 1 to 256 tokens, 9 pairs. Quick: 1 and 64 tokens, 5 pairs."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    pairs, counts = (5, (1, 64)) if options.quick else (9, TOKENS)
    weight = rng.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.03)
    rows: list[dict[str, Cell]] = []
    with progress() as bar:
        task = bar.add_task("kernels", total=len(BITS) * len(counts))
        for bits in BITS:
            matrix = quantise(weight, bits, GROUP)
            for n in counts:
                x = torch.from_numpy(rng.standard_normal((n, COLUMNS), np.float32))
                if options.wants(f"{bits} bits, {n}"):
                    rows.append(_row(matrix, x, pairs))
                bar.advance(task)
    columns = [
        "kernel",
        "bits",
        "tokens",
        "us",
        "GB/s",
        "error",
        "fp32 ratio",
        "unpack ratio",
        "int8pack ratio",
        "torch kernel ratio",
    ]
    settings = {"rows": ROWS, "columns": COLUMNS, "group": GROUP, "threads": 1, "pairs": pairs, "kernel": kernel.name}
    return Result("expert-kernels", rows, claims(rows), columns, settings, options.quick)


def _row(matrix: Matrix, x: Tensor, pairs: int) -> dict[str, Cell]:
    ours, n, bytes_ = kernel.kernel(), len(x), matrix.codes.nbytes + matrix.scales.nbytes
    copies = APART // bytes_ if n == 1 else 1
    held = [Matrix(matrix.shape, matrix.bits, matrix.group, matrix.scales.copy(), matrix.codes.copy()) for _ in range(copies)]
    block = max(1, min(40, 400 // n)) if n > 1 else min(copies, 40)
    own = _repeated(ours, held, x, block)
    w = torch.from_numpy(dequantise(matrix))
    exact = linear(x.double(), w.double())
    error = float((ours.linear(matrix, x).double() - exact).norm() / exact.norm())
    wide = [w.clone() for _ in range(max(1, APART // (4 * w.numel())) if n == 1 else 1)]
    turn = cycle(wide)
    timed = {"fp32": paired(lambda: [linear(x, next(turn)) for _ in range(block)], own, pairs)}
    few = max(1, block // 8)
    short = _repeated(ours, held, x, few)
    timed["unpack"] = paired(lambda: [linear(x, torch.from_numpy(dequantise(matrix))) for _ in range(few)], short, pairs)
    other = cycle([(torch.from_numpy(dequantise(matrix)) * 100).to(torch.int8) for _ in range(1 if n > 1 else 24)])
    scales, narrow = torch.full((ROWS,), 0.01, dtype=torch.bfloat16), x.bfloat16()
    timed["int8pack"] = paired(
        lambda: [torch._weight_int8pack_mm(narrow, next(other), scales) for _ in range(block)], own, pairs
    )
    timed["torch kernel"] = paired(_repeated(PORTABLE, held, x, few), short, pairs)
    seconds = timed["fp32"].each(block)[1] / 1e3
    return {
        "kernel": ours.name, "bits": matrix.bits, "tokens": n, "us": 1e6 * seconds,
        "GB/s": bytes_ / seconds / 1e9, "error": error,
        **{f"{name} ratio": t.ratio for name, t in timed.items()},
        **{f"{name} us": 1e3 * t.each(few if name in ("unpack", "torch kernel") else block)[0] for name, t in timed.items()},
    }  # fmt: skip


def _repeated(which: Kernel, held: list[Matrix], x: Tensor, count: int) -> Callable[[], object]:
    turn = cycle(held)
    return lambda: [which.linear(next(turn), x) for _ in range(count)]


def claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    """The native kernel stays only while it pays: docs/adr/012-expert-kernel.md."""
    out = []
    for row in rows:
        bits, n = row["bits"], row["tokens"]
        what, id_ = f"{bits} bits, {n} token{'s' if n != 1 else ''}", f"expert-kernels.{bits}.{n}"
        out.append(
            Claim(f"{id_}.unpack", f"{what}: unpack and multiply ÷ kernel", number(row["unpack ratio"]), "≥", 1.0, unit="×")
        )
        if n == 1:
            out.append(Claim(f"{id_}.fp32", f"{what}: torch fp32 ÷ kernel", number(row["fp32 ratio"]), "≥", 2.0, unit="×"))
        out.append(Claim(f"{id_}.error", f"{what}: relative error of the int8 input", number(row["error"]), "≤", 0.01))
    return out


def plot(result: Result, path: Path) -> None:
    """Time per token over tokens, for each width, and of float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for bits in sorted({int(number(r["bits"])) for r in result.rows}):
        some = [r for r in result.rows if r["bits"] == bits]
        axis.plot(
            [number(r["tokens"]) for r in some],
            [number(r["us"]) / number(r["tokens"]) for r in some],
            "o-",
            label=f"{bits} bits",
        )
    most = max(number(r["bits"]) for r in result.rows)
    last = [(number(r["tokens"]), number(r["fp32 us"]) / number(r["tokens"])) for r in result.rows if r["bits"] == most]
    axis.plot(*zip(*last, strict=True), "k--", label="torch fp32")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens at once")
    axis.set_ylabel(f"µs per token, {ROWS} x {COLUMNS}")
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
