"""What a diagnosis hands back: a code for machines, a sentence for people, the numbers behind it.

code                   says                                                                             found by
too-few-images         so few calibration images that ranges and shares say little                       amount
untrained              the norms hold the values a new layer begins with: weights were not loaded        untrained
input-reading          the model fits the images better under another preprocessing or channel order    reading
chance                 the classes it names have nothing to do with the labels                           chance
one-answer             unlabelled images, and hardly an answer depends on the image                      chance
labels                 labels that were given and cannot be used, or are numbered otherwise              labels
validation-overlap     validation images that are calibration images, too                                held_out
validation-unlabelled  validation images without labels: only agreement was measured                     held_out
lost-channels          output channels whose error is as large as they are themselves                    channels
targets-differ         two runtimes whose difference was accepted, or cannot be told from so few images  pipeline
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """Something doubtful that does not stop an export (`--strict` does)."""

    code: str
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {"code": self.code, "message": self.message, "numbers": dict(self.numbers)}
