"""What the elastic benchmark runs on: pictures, sizes of a run, and the net that everything starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from bench.adaptation.rows import weights
from bench.bundles import IMAGENET
from bench.result import Options
from demo.images import cifar10
from demo.models import load_npz, resnet20
from export.elastic.data import Labelled, Split
from export.elastic.folder import Training
from export.elastic.judge import Judge
from export.elastic.supernet import Supernet
from refold.preprocess import Preprocess

__all__ = ["FULL", "PREPROCESS", "QUICK", "SEARCHED", "UNIFORM", "Pictures", "Scale", "float_net"]

UNIFORM = ((8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 4))
SEARCHED = ((4, 4), (3, 3), (2, 4))  # each within the bytes and the bit operations of this uniform one
TRAIN, SEARCH = 5000, 2000  # of the joined pictures: train5k first, then the test set
FULL, QUICK = 160, 8  # steps; 160 of 128 pictures are four epochs of train5k, and some forty minutes in all on two cores
LR = 7e-5  # from trained weights; 160 steps at 1e-4 cost more at 8 bits (`python -m bench.tuning elastic`)
PREPROCESS = Preprocess(32, 32, **IMAGENET)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scale:
    """How large a run is. Pictures: `search` for a measured pair, `final` for a finalist, `report` for a published accuracy."""

    training: Training
    pairs: int
    rounds: int
    generations: int
    search: int
    final: int
    report: int
    alone: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, options: Options) -> Scale:
        steps = options.steps or (QUICK if options.quick else FULL)
        if options.quick:
            small = Training(steps, batch=32, lr=LR, seed=options.seed, checkpoint_every=4, calibration=64)
            return cls(small, pairs=12, rounds=1, generations=20, search=100, final=100, report=200, alone=((4, 4), (2, 4)))
        training = Training(steps, lr=LR, seed=options.seed, checkpoint_every=20)
        return cls(training, pairs=180, rounds=2, generations=80, search=500, final=2000, report=8000, alone=UNIFORM)


@dataclass(frozen=True)
class Pictures:
    """train5k and the test set as one row, so that indices cannot be mixed up."""

    scale: Scale

    @cached_property
    def data(self) -> Labelled:
        (learned, known), (other, truth) = cifar10("train5k"), cifar10("test")
        images, labels = np.concatenate([learned, other]), np.concatenate([known, truth])
        return Labelled(labels, lambda index: images[index])

    def split(self, first: int, last: int) -> Split:
        return Split(np.arange(TRAIN), np.arange(TRAIN + first, TRAIN + last))

    @property
    def searching(self) -> Split:
        return self.split(0, SEARCH)

    @property
    def reporting(self) -> Split:
        return self.split(SEARCH, len(self.data) - TRAIN)

    def judge(self, net: Supernet, split: Split, count: int) -> Judge:
        return Judge(net, self.data, split, PREPROCESS, self.scale.training, count)


def float_net() -> nn.Module:
    return load_npz(resnet20(), weights("resnet20_cifar10.npz")).eval()
