"""Undecided candidates: kept, and judged again when more held-out samples have come; not for ever.

A kept candidate lives in the worker's memory. Its decision marks no evidence as used, so a restarted worker trains it again,
to the same numbers, from the stored samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cloud.gating.verdict import Finding, GateResult
from cloud.lesson import Candidate
from cloud.settings import GateSettings

__all__ = ["Kept", "keep"]


@dataclass(frozen=True)
class Kept:
    """One candidate between two judgements.

    Attributes:
        held_out: samples it was last judged on; wanted: samples at which it is judged again.
        judgements: how many there were.
    """

    candidate: Candidate
    held_out: int
    wanted: int
    judgements: int = 1

    def due(self, held_out: int) -> bool:
        return held_out >= self.wanted


def keep(
    candidate: Candidate, result: GateResult, held_out: int, before: Kept | None, settings: GateSettings
) -> tuple[GateResult, Kept | None]:
    """Pure: what becomes of a result. An undecided candidate is kept; after `judgements` times it is refused.

    Args:
        held_out: samples it was judged on, of those stored.
        before: the same candidate after its last judgement; None at the first.
    """
    if result.finding is not Finding.WAIT:
        return result, None
    judgements = before.judgements + 1 if before is not None else 1
    if judgements >= settings.judgements or held_out >= settings.held_back_most:
        told = f"refused after {judgements} judgements on up to {held_out} held-out samples: {result.reasons[0]}"
        return replace(result, finding=Finding.REFUSE, reasons=(told,)), None
    wanted = max(math.ceil(held_out * settings.more_evidence), held_out + 1, settings.held_back)
    return result, Kept(candidate, held_out, min(wanted, settings.held_back_most), judgements)
