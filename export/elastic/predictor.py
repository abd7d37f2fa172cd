"""Conditional quantisation-aware accuracy predictor (EQ-Net eq. 9): MLP(form | bits of every layer and value) -> top-1.

Encoding, 6 + 7 (layers + values) numbers: three one-hot pairs (granularity, symmetry of weights, symmetry of activations), then
a one-hot of seven bit-widths for each layer and each value; pinned places are all zero. Both halves of a pair are written: the
published code leaves "asymmetric" out, so that it is encoded as absence.

A few hundred pairs are few for it, so what it says is averaged with a Gaussian process on rounding noise (process.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.elastic.genome import Genome
from export.elastic.layout import Layout
from export.elastic.process import NoiseProcess

__all__ = ["Predictor", "Quality", "encode", "kendall", "pearson", "spearman"]

F32 = NDArray[np.float32]
WIDTH, DEPTH = 200, 7
EPOCHS, FEWEST_UPDATES = 100, 1000  # few pairs make few updates in 100 epochs: then there are more epochs
LR, WEIGHT_DECAY, BATCH = 4e-4, 1e-5, 256


def encode(layout: Layout, genome: Genome) -> F32:
    """float32 (6 + 7 (layers + values),)."""
    pairs = [
        hot
        for flag in (genome.form.per_channel, genome.form.weight_symmetric, genome.form.activation_symmetric)
        for hot in (float(flag), float(not flag))
    ]
    out = np.zeros((len(layout.layers) + len(layout.values), 7), np.float32)
    w, a = iter(genome.weight_bits), iter(genome.activation_bits)
    pinned = [*(p.pinned for p in layout.layers), *(v.pinned for v in layout.values)]
    for row, fixed in enumerate(pinned):
        if not fixed:
            out[row, next(w if row < len(layout.layers) else a) - 2] = 1
    return np.concatenate([np.asarray(pairs, np.float32), out.ravel()])


@dataclass(frozen=True)
class Quality:
    """Correlation of predicted with measured accuracy on pairs the predictor never saw; NaN with fewer than three."""

    pairs: int
    pearson: float
    kendall: float
    spearman: float
    predicted: tuple[float, ...] = ()
    measured: tuple[float, ...] = ()


class Predictor:
    """Trained on measured (genome, accuracy) pairs of one supernet."""

    def __init__(self, layout: Layout, seed: int = 0) -> None:
        self.layout, self.seed = layout, seed
        self.mean, self.spread = 0.0, 1.0
        self.process: NoiseProcess | None = None
        size = 6 + 7 * (len(layout.layers) + len(layout.values))
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for i in range(DEPTH):
            layers += [nn.Linear(size if i == 0 else WIDTH, WIDTH), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 1, bias=False))
        for module in self.net:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def fit(self, genomes: Sequence[Genome], accuracies: Sequence[float]) -> None:
        """The network: smooth L1 on accuracies brought to mean 0 and deviation 1; Adam."""
        self.process = NoiseProcess(genomes, accuracies)
        x = torch.from_numpy(np.stack([encode(self.layout, g) for g in genomes]))
        y = torch.tensor(accuracies, dtype=torch.float32)
        self.mean, self.spread = float(y.mean()), max(float(y.std()) if len(y) > 1 else 0.0, 1e-3)
        y = (y - self.mean) / self.spread
        batch = min(BATCH, max(16, len(x) // 8))
        epochs = max(EPOCHS, math.ceil(FEWEST_UPDATES / math.ceil(len(x) / batch)))
        optimiser = torch.optim.Adam(self.net.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(x), generator=generator), batch):
                optimiser.zero_grad()
                torch.autograd.backward(nn.functional.smooth_l1_loss(self.net(x[index])[:, 0], y[index]))
                optimiser.step()

    def __call__(self, genomes: Sequence[Genome]) -> F32:
        """Accuracies, float32 (n,)."""
        x = torch.from_numpy(np.stack([encode(self.layout, g) for g in genomes]))
        with torch.no_grad():
            found = np.asarray(self.net(x)[:, 0].numpy() * self.spread + self.mean, np.float32)
        return found if self.process is None else np.asarray((found + self.process(genomes)) / 2, np.float32)

    @classmethod
    def judged(
        cls, layout: Layout, genomes: Sequence[Genome], accuracies: Sequence[float], seed: int = 0
    ) -> tuple[Predictor, Quality]:
        """A predictor of all pairs, and the quality of one that was taught with four fifths of them."""
        order = np.random.default_rng((seed, 6)).permutation(len(genomes))
        cut = max(1, round(0.8 * len(genomes)))
        taught, kept = order[:cut], order[cut:]
        trial = cls(layout, seed)
        trial.fit([genomes[i] for i in taught], [accuracies[i] for i in taught])
        quality = Quality(len(kept), math.nan, math.nan, math.nan)
        if len(kept) >= 3:
            predicted, measured = trial([genomes[i] for i in kept]), np.asarray([accuracies[i] for i in kept])
            told = tuple(map(float, predicted)), tuple(map(float, measured))
            linear, tau, rho = (f(predicted, measured) for f in (pearson, kendall, spearman))
            quality = Quality(len(kept), linear, tau, rho, *told)
        whole = cls(layout, seed)
        whole.fit(genomes, accuracies)
        return whole, quality


def pearson(a: Sequence[float] | F32, b: Sequence[float] | NDArray[np.float64]) -> float:
    """Linear correlation; NaN where one side does not vary."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else math.nan


def kendall(a: Sequence[float] | F32, b: Sequence[float] | NDArray[np.float64]) -> float:
    """Rank correlation tau-b (ties counted out); NaN where one side does not vary."""
    x, y = (np.sign(np.subtract.outer(v, v)) for v in (np.asarray(a, float), np.asarray(b, float)))
    size = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else math.nan


def spearman(a: Sequence[float] | F32, b: Sequence[float] | NDArray[np.float64]) -> float:
    """Rank correlation rho: the linear correlation of the ranks, equal values at their mean rank."""
    x, y = (_ranks(np.asarray(v, float)) for v in (a, b))
    return pearson(list(x), y)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((count.cumsum() - (count - 1) / 2)[place], float)
