"""What a pager counts.

A hit is strict: the expert was in memory before its layer asked, and not because read-ahead of the same token brought it. What
read-ahead brought counts as `covered`, whether it had come in time or was still on its way (`late`). So hit rates compare with
a cache's, and what prediction adds stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters", "TokenRecord"]


@dataclass(frozen=True)
class TokenRecord:
    """Of one token. stall_seconds: the model waited for the disk."""

    asked: int
    hits: int
    bytes_read: int
    stall_seconds: float


@dataclass(frozen=True)
class Counters:
    """Since the pager was opened.

    Attributes:
        tokens: ends of tokens. asked: experts asked for: hits + covered + misses.
        hits: strict. covered: brought by read-ahead for the same token; late: of these, those still on their way.
        bytes_read: all that came from the disk; demand_bytes and ahead_bytes by who asked.
        stall_seconds: the model waited for the disk. busy_seconds: the disk was at work.
        ahead_useful: records read ahead that their token asked for; ahead_wasted: that it did not;
        ahead_wasted_bytes: bytes of the wasted ones, cancelled parts included.
        evictions: records that left. reread: records read again because of their digest.
        resident_bytes: memory of records now; budget: its most.
    """

    tokens: int
    asked: int
    hits: int
    covered: int
    late: int
    misses: int
    bytes_read: int
    demand_bytes: int
    ahead_bytes: int
    stall_seconds: float
    busy_seconds: float
    ahead_useful: int
    ahead_wasted: int
    ahead_wasted_bytes: int
    evictions: int
    reread: int
    resident_bytes: int
    budget: int

    @property
    def hit_rate(self) -> float:
        """Strict; 0 before anything was asked for."""
        return self.hits / self.asked if self.asked else 0.0

    @property
    def coverage(self) -> float:
        """Share of what was asked for that read-ahead of the same token had begun to bring."""
        return self.covered / self.asked if self.asked else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / self.tokens if self.tokens else 0.0
