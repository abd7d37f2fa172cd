"""What an export doubts: each diagnosis is one file that turns measurements into `Finding`s; none of them stops an export.

    amount       enough different calibration images?
    labels       labels that cannot be the model's class numbers
    untrained    norms as a new layer begins
    reading      the model fits the images better under another preprocessing or channel order
    chance       answers that have nothing to do with the labels, or with the images
    channels     outputs that are lost in integers
    held_out     accuracy on images nothing was fitted to (`--validation`)
    intervals    exact statistics of few images

`--strict` turns findings into a refusal. Why they warn and do not refuse: docs/adr/014-what-export-doubts.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from export.diagnose.amount import amount
from export.diagnose.chance import above_chance, chance, one_answer
from export.diagnose.finding import Finding
from export.diagnose.labels import numbering
from export.diagnose.reading import respond, unlikely_reading
from export.diagnose.untrained import untrained
from export.ir import Graph
from export.pictures import Pictures
from refold.norms import NormTable
from refold.preprocess import Preprocess

__all__ = ["Finding", "diagnose"]

FEW = 64  # images whose answers are looked at where there are no labels


def diagnose(
    graph: Graph, table: NormTable, pictures: Pictures, preprocess: Preprocess, logits: NDArray[np.float32]
) -> Iterator[Finding]:
    """Everything that can be doubted of a float model and its calibration images, the cause before its symptom.

    Args:
        graph: the float graph after its rules.
        table: its norms, as exported.
        logits: the float model's answers, float32 (N, classes).
    """
    yield from amount(pictures.images)
    predicted, labels = np.asarray(logits.argmax(1), np.int64), pictures.labels
    right = labels is not None and above_chance(predicted, labels)
    causes = [] if right else [*untrained(table)]
    if not causes:
        causes = [*unlikely_reading(graph, pictures.images, preprocess, labels)]
    if labels is not None and not causes:
        causes = [*numbering(predicted, labels, logits.shape[1])]
    yield from causes
    if labels is not None:
        yield from chance(predicted, labels)
    elif not causes:
        few = np.linspace(0, len(logits) - 1, min(len(logits), FEW)).astype(np.int64)
        seen = respond(graph, preprocess.apply(pictures.images[few]))
        yield from one_answer(logits, seen.mismatch)
