"""From a run and a configuration to what `export.pipeline.export_model` takes: the captured model and a `Given`.

The integers, scales and norm statistics are exactly those the supernet was judged with. 8-bit weights for a target whose
kernels take codes up to ±64 are 7-bit roundings of the same float weights, per channel and symmetric (see
`export.elastic.frozen.freeze`), and the norm statistics are measured behind those.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.export import ExportedProgram

from export.elastic.data import Labelled, Split, load_labelled
from export.elastic.folder import RunFolder, Settings
from export.elastic.frozen import Frozen
from export.elastic.judge import Judge
from export.elastic.space import Configuration
from export.elastic.train import calibration_index
from export.given import Given
from export.pictures import Pictures
from refold.errors import InputError

__all__ = ["Delivery", "Workshop", "deliver", "given_of"]


@dataclass(frozen=True)
class Workshop:
    """A finished run with its data at hand."""

    run: RunFolder
    settings: Settings
    data: Labelled
    split: Split
    judge: Judge

    @classmethod
    def open(cls, run: RunFolder, data: Path | None = None, qmax: int = 127, pictures: int = 2000) -> Workshop:
        """Args:
            data: where the training's pictures lie now; None: where they lay.

        Raises:
            InputError: no run, no pictures, or other pictures than those the run was trained on.
        """  # fmt: skip
        settings = run.settings()
        labelled = load_labelled(data or Path(settings.data), settings.preprocess, settings.classes)
        if settings.labels != labelled.digest:
            raise InputError("These are not the pictures that the run was trained on: their labels differ.", code="data")
        split = Split.of(labelled.labels, settings.training.seed)
        judge = Judge(run.supernet(), labelled, split, settings.preprocess, settings.training, pictures, qmax)
        return cls(run, settings, labelled, split, judge)

    def configuration(self, name: str) -> Configuration:
        return self.run.configuration(name, self.judge.supernet.layout)

    def pictures(self, most: int) -> Pictures:
        """Calibration pictures for a bundle, with labels: training pictures only."""
        index = calibration_index(self.split, self.settings.training)
        rest = np.setdiff1d(self.split.train, index)
        index = np.sort(np.concatenate([index, rest])[:most])
        return Pictures(self.data.read(index), self.data.labels[index])


@dataclass(frozen=True)
class Delivery:
    """program: the captured float model; accuracy: of the integers on held-out pictures."""

    program: ExportedProgram
    given: Given
    accuracy: float


def given_of(frozen: Frozen) -> Given:
    return Given(frozen.weights, frozen.scales, frozen.graph.constants)


def deliver(workshop: Workshop, configuration: Configuration) -> Delivery:
    """Raises UsageError when the configuration is not one of the run's."""
    frozen = workshop.judge.freeze(configuration)
    return Delivery(workshop.run.program(), given_of(frozen), workshop.judge.accuracy_of(frozen))
