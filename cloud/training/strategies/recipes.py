"""The three recipes with loops of their own, described like every other strategy. They run in `cloud.distil`."""

from __future__ import annotations

from typing import ClassVar

from cloud.training.step import NoSettings

__all__ = ["CemaPaper", "CemaReleased", "Refold"]


class Refold:
    """`cloud.distil.recipe`: sharpened votes on uploads, labels on restyled calibration images, one cycle of Adam."""

    source: ClassVar[str] = "this project, docs/guide/adaptation.md"
    formula: ClassVar[str] = "−Σ w·t^4/Σt^4 · ln p on uploads and restyled calibration images, w ∝ max(t)^4"
    settings_type: ClassVar[type] = NoSettings


class CemaPaper:
    """`cloud.distil.cema`: the published steps of teacher and student, norms by batch renormalisation.

    Its selection of uploads is the device's: the selector "cema-paper", dynamic entropy thresholds.
    """

    source: ClassVar[str] = "Chen et al., ICLR 2024, arXiv 2402.17316; chenyaofo/CEMA @9a6ef17"
    formula: ClassVar[str] = "the loss of `cema`, 32 new uploads and 96 replayed a step; each teacher's own entropy before it"
    settings_type: ClassVar[type] = NoSettings


class CemaReleased(CemaPaper):
    """The same steps; the device's selector is "cema-released": a static threshold and EATA's redundancy test."""
