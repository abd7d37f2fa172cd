"""Output corrections: neighbours in time say what one frame alone does not, where classes come in runs.

    logits ─► softmax ─► [second look: unsure?] ─► evidence: do predicted classes come in runs? ─► no: as the engine said
                                                                    └ yes ─► correction: LAME, T3A or AdaNPC

    correction.py    what a correction is
    lame.py          LAME   (CVPR 2022): answers of like frames are drawn together
    t3a.py           T3A    (NeurIPS 2021): class templates from the surest frames
    adanpc.py        AdaNPC (ICML 2023): votes of the nearest remembered frames
    evidence.py      the switch: a permutation test on predicted classes, without labels
    corrector.py     one stream's switch and correction; the same behind a lock for requests
    second_look.py   the mirrored image, for unsure answers only, within a share of the compute

Published errors of LAME on CIFAR-10-C: 43.5 → 64.3 % on shuffled frames, 32.7 → 11.3 % where classes come in runs
(mariodoebler/test-time-adaptation, benchmark tables). So none is served unless the newest frames' classes are more alike
than the stream's class mix explains. Measured here with `python -m bench corrections`: docs/guide/adaptation.md.

A device has no features: an engine returns logits, and only they are the same on every runtime. All three therefore work in
the space of logits. The logits z = W h + b are all that the classifier sees of the last layer's input h; W⁺(z - b), the part of
h that could be had back, is a linear map of z: it would change the metric and add no information.
"""

from __future__ import annotations

from edge.adaptation.corrections.adanpc import AdaNPC
from edge.adaptation.corrections.correction import Correction
from edge.adaptation.corrections.corrector import AUTO, CORRECTIONS, Corrector, RequestCorrector, as_logits, make_corrector
from edge.adaptation.corrections.evidence import RunEvidence, RunSettings
from edge.adaptation.corrections.lame import Lame
from edge.adaptation.corrections.second_look import SecondLook
from edge.adaptation.corrections.t3a import T3A

__all__ = [
    "AUTO",
    "CORRECTIONS",
    "T3A",
    "AdaNPC",
    "Correction",
    "Corrector",
    "Lame",
    "RequestCorrector",
    "RunEvidence",
    "RunSettings",
    "SecondLook",
    "as_logits",
    "make_corrector",
]
