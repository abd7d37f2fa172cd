"""Wisdom of crowds: only images whose predicted class has become more confident since the source model count.

Lee et al., "Towards Open-Set Test-Time Adaptation Utilizing the Wisdom of Crowds in Entropy Minimization" (ICCV 2023, arXiv
2308.06879): with c the source model's answer, keep x where the present model gives c at least the source model's confidence.
The tolerance, and keeping everything where nothing is left, are those of a third party's code; the paper's tolerance is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloud.training.step import Modifier, Step

__all__ = ["WisdomOfCrowds", "WisdomSettings", "grown_confidence"]


@dataclass(frozen=True)
class WisdomSettings:
    """crowd_margin: confidence that may be lost all the same."""

    crowd_margin: float = 0.0


def grown_confidence(now: Tensor, before: Tensor, margin: float) -> Tensor:
    """bool (n,): p_now[c] ≥ p_before[c] − margin, c = argmax p_before; from logits (n, classes)."""
    before, now = torch.softmax(before, 1), torch.softmax(now, 1)
    best = before.max(1)
    return now.gather(1, best.indices[:, None])[:, 0] >= best.values - margin


class WisdomOfCrowds(Modifier[WisdomSettings]):
    """See the module."""

    source: ClassVar[str] = "Lee et al., ICCV 2023, arXiv 2308.06879"
    formula: ClassVar[str] = "keep where p[c] ≥ p0[c], c = argmax p0, p0: exported model"
    needs: ClassVar[frozenset[str]] = frozenset({"exported"})
    settings_type: ClassVar[type] = WisdomSettings

    def weights(self, step: Step) -> Tensor:
        assert step.exported is not None
        kept = grown_confidence(step.student.logits.detach(), step.exported, self.settings.crowd_margin)
        return kept.float() if kept.any() else torch.ones_like(kept, dtype=torch.float32)
