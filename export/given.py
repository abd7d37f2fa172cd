"""What a training hands to the exporter in place of calibration and rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from export.quantise import WeightCodes
from export.scales import Scale

__all__ = ["Given"]


@dataclass(frozen=True)
class Given:
    """Attributes:
    weights: by layer output; codes int8 with the zero point already subtracted (q - z), scale float32 (channels,), bits.
    scales: by scaled value; codes 0..levels-1.
    """

    weights: Mapping[str, WeightCodes]
    scales: Mapping[str, Scale]
