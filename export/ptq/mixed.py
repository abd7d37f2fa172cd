"""Mixed precision by sensitivity, without training: the fewest bits where they are minded least, until the bytes suffice.

Errors of different layers add up like independent noise, in squares. From 8 bits down the layer is lowered whose square grows
least for each byte it gives back; for a sum of convex curves this greedy walk is the optimum at every size it passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from export.bits import BitPlan, plan_of
from export.ptq.sensitivity import LayerSensitivity
from refold.errors import UsageError

__all__ = ["mixed"]


def mixed(rows: Sequence[LayerSensitivity], budget: int) -> tuple[BitPlan, dict[str, int]]:
    """Bits that fit into `budget` bytes of weights: (the plan, bits by layer name).

    Raises:
        UsageError: not even the fewest bits fit; it says what the least is.
    """
    bits = {row.name: max(row.errors) for row in rows}
    size = sum(row.size(bits[row.name]) for row in rows)
    least = sum(row.size(max(row.errors) if row.pinned else min(row.errors)) for row in rows)
    if budget < least:
        raise UsageError(
            f"No choice of bits fits into {budget:,} bytes: with {min(rows[0].errors)} bits in all layers but the first "
            f"and the last the weights take {least:,}. Allow that much, or name the first or last layer in --bits.",
            code="budget",
        )
    while size > budget:
        row, lower = min(
            ((r, b) for r in rows if not r.pinned for b in r.errors if b < bits[r.name]),
            key=lambda move: _price(move[0], bits[move[0].name], move[1]),
        )
        size -= row.size(bits[row.name]) - row.size(lower)
        bits[row.name] = lower
    return plan_of(bits), bits


def _price(row: LayerSensitivity, now: int, lower: int) -> float:
    saved = row.size(now) - row.size(lower)
    return (row.errors[lower] ** 2 - row.errors[now] ** 2) / max(saved, 1)
