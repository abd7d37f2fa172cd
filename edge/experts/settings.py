"""Every number of the pager, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from edge.experts.policies import POLICIES, ValueWeights
from edge.experts.store import Verify
from refold.errors import UsageError
from refold.experts import ALIGNMENT

__all__ = ["PagerSettings"]


@dataclass(frozen=True)
class PagerSettings:
    """How a pager works.

    Attributes:
        policy: name in `policies.POLICIES`. weights: of the policy `value`; None for those tuned by replay.
        threads: readers; two saturate most flash. block: bytes of one read, 256 KiB to 1 MiB: a demand read waits for one at
        most.
        direct: reads go past the page cache. verify: when digests are checked.
        pin: share of the budget for experts that more than `pin_above` of a layer's tokens use; these never leave.
        warm: the most frequent experts are read at the start, as far as memory goes.
        ahead: read-ahead at all. threshold: least chance that a guess is worth a read.
        ahead_share: of the budget that read-ahead under way may take.
        paths: where the path table is kept: "beside" the bundle, "off", or a folder.
        path_order: layers that the path table looks back, 2 (EdgeMoE) or 1.
    """

    policy: str = "value"
    weights: ValueWeights | None = None
    threads: int = 2
    block: int = 512 * 1024
    direct: bool = True
    verify: Verify = "first"
    pin: float = 0.25
    pin_above: float = 0.5
    warm: bool = True
    ahead: bool = True
    threshold: float = 0.4
    ahead_share: float = 0.25
    paths: str = "beside"
    path_order: int = 2

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"There is no cache policy {self.policy!r}; choose one of: {', '.join(POLICIES)}.")
        if self.verify not in get_args(Verify):
            raise UsageError(f"Digests are verified first, always or never, not {self.verify!r}.")
        if not 1 <= self.threads <= 16:
            raise UsageError(f"One to sixteen threads read experts, not {self.threads}.")
        if self.block < ALIGNMENT or self.block % ALIGNMENT:
            raise UsageError(f"A block is a multiple of {ALIGNMENT} bytes, not {self.block}.")
        if self.path_order not in (1, 2):
            raise UsageError(f"The path table looks back one or two layers, not {self.path_order}.")
        for name in ("pin", "pin_above", "threshold", "ahead_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a share between 0 and 1, not {getattr(self, name)!r}.")

    def paths_file(self, bundle: Path) -> Path | None:
        """Where the path table of this bundle is kept; None: nowhere."""
        if self.paths == "off":
            return None
        if self.paths == "beside":
            return bundle.with_name(bundle.name + ".paths.npz")
        return Path(self.paths) / (bundle.name + ".paths.npz")
