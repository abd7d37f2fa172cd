"""What a device does with its own evidence: norm statistics that are served, answers that are corrected, frames that are new.

owner.py       Adaptation: carries out what the adapter (edge/adapt/) decides; the one owner of engine slot and releases
corrections/   output corrections: the stream's own order improves answers, where measured evidence says that it can
novelty.py     NoveltyGate: marks frames that no domain explains, to be uploaded first
"""

from __future__ import annotations

from edge.adaptation.owner import Adaptation

__all__ = ["Adaptation"]
