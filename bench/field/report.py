"""Rows and claims of the field streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.field.device import Run
from bench.result import Cell, Claim, number

__all__ = ["WINDOW", "claims", "row", "worst_window"]

I64 = NDArray[np.int64]
WINDOW = 500  # frames in a row in which a stream may not lose more than 3 points


def worst_window(adapted: NDArray[np.bool_], frozen: NDArray[np.bool_], window: int = WINDOW) -> float:
    """Least difference of accuracies, in points, over any so many frames in a row (all, where there are fewer)."""
    difference = adapted.astype(np.float64) - frozen
    window = min(window, len(difference))
    sums = np.concatenate([[0.0], np.cumsum(difference)])
    return 100 * float((sums[window:] - sums[:-window]).min()) / window


def row(network: str, stream: str, run: Run, labels: I64) -> dict[str, Cell]:
    adapted, frozen = run.adapted == labels, run.frozen == labels
    quarter = slice(-(len(labels) // 4), None)
    return {
        "network": network,
        "stream": stream,
        "frames": len(labels),
        "frozen": round(100 * float(frozen.mean()), 2),
        "adapted": round(100 * float(adapted.mean()), 2),
        "difference": round(100 * float(adapted.mean() - frozen.mean()), 2),
        "worst 500": round(worst_window(adapted, frozen), 2),
        "last quarter": round(100 * float(adapted[quarter].mean() - frozen[quarter].mean()), 2),
        "shifts": run.metrics["shifts"],
        "measured": run.metrics["measured"],
        "swaps": len(run.swaps),
    }


def claims(rows: Sequence[Mapping[str, Cell]]) -> list[Claim]:
    """Per network: the worst stream, and the worst 500 frames in a row of any."""
    out = []
    for network in dict.fromkeys(str(r["network"]) for r in rows):
        mine = [r for r in rows if r["network"] == network]
        lowest = min(mine, key=lambda r: number(r["difference"]))
        window = min(mine, key=lambda r: number(r["worst 500"]))
        out += [
            Claim(f"field.{network}.stream", f"{network}: adapted against frozen, worst stream ({lowest['stream']})",
                  number(lowest["difference"]), "≥", -1.0, unit=" points"),
            Claim(f"field.{network}.window", f"{network}: adapted against frozen, worst 500 frames ({window['stream']})",
                  number(window["worst 500"]), "≥", -3.0, unit=" points"),
        ]  # fmt: skip
    return out
