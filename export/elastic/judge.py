"""How good a configuration is: accuracy on held-out pictures, with its own norm statistics and the integers that would ship."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.elastic.data import Labelled, Split, augmented
from export.elastic.folder import Training
from export.elastic.frozen import Frozen, freeze
from export.elastic.space import Configuration
from export.elastic.supernet import Supernet
from export.elastic.train import statistics_index
from export.interpret import float_parameters, run
from refold.preprocess import Preprocess

__all__ = ["Judge"]

BATCH = 64
MOST_HELD = 256 * 2**20  # bytes of pictures kept in memory; beyond that they are read again for each configuration


class Judge:
    """Measures configurations of one supernet.

    Args:
        pictures: at most so many of the held-out ones.
        qmax: largest weight code of the target.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: Labelled,
        split: Split,
        preprocess: Preprocess,
        training: Training,
        pictures: int = 2000,
        qmax: int = 127,
    ) -> None:
        self.supernet, self.preprocess, self.qmax = supernet, preprocess, qmax
        rng = np.random.default_rng((training.seed, 5))
        held = np.sort(rng.permutation(split.held)[:pictures])
        self.calibration = self._kept(_as_trained(data, training), statistics_index(split, training, pictures))
        self.held = self._kept(data, held)

    def _kept(self, data: Labelled, index: NDArray[np.int64]) -> Labelled:
        plan = self.preprocess
        if len(index) * plan.height * plan.width * 3 > MOST_HELD:
            return Labelled(data.labels[index], lambda part: data.read(index[part]))
        images = data.read(index)
        return Labelled(data.labels[index], lambda part: images[part])

    def _batches(self, data: Labelled) -> Iterator[Tensor]:
        return data.batches(self.preprocess, np.arange(len(data)), BATCH)

    def freeze(self, configuration: Configuration) -> Frozen:
        return freeze(self.supernet, configuration, self._batches(self.calibration), self.qmax)

    def accuracy(self, configuration: Configuration) -> float:
        """Top-1, 0..1."""
        return self.accuracy_of(self.freeze(configuration))

    def accuracy_of(self, frozen: Frozen) -> float:
        logits = frozen.logits(self._batches(self.held))
        return float((logits.argmax(1) == self.held.labels).mean())

    def float_accuracy(self) -> float:
        """Of the float model that the training started from."""
        graph = self.supernet.captured
        parameters = float_parameters(graph)
        with torch.no_grad():
            logits = np.concatenate([run(graph, batch, parameters).numpy() for batch in self._batches(self.held)])
        return float((logits.argmax(1) == self.held.labels).mean())


def _as_trained(data: Labelled, training: Training) -> Labelled:
    """Norm statistics are those of what the net was trained on: plain pictures' cost ResNet-20 three points."""

    def read(index: NDArray[np.int64]) -> NDArray[np.uint8]:
        rng = np.random.default_rng((training.seed, 7, int(index[0])))
        return augmented(data.read(index), rng)

    return Labelled(data.labels, read) if training.augment else data
