"""Training, step by step:

    pictures ─► micro-batches ─► loss ─► gradients, rounded and of unit length ─► momentum SGD on the master
                                                                                       │
           leaves drawn anew on the grids ◄─ switches of the tensors that are due ◄────┘

Everything random comes from the seed and the step's number, so that a run that goes on from a checkpoint ends in the same bytes
as one that was never stopped (one thread, same machine).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from export.fixed_point.network import Network, generator_of, macs
from export.fixed_point.precision import (
    Strategy,
    gradient_diversity,
    lookback_after,
    next_strategy,
    push_down,
    push_up,
    resolution_after,
)
from export.fixed_point.report import Costs, step_costs
from refold.errors import InputError, ModelError
from refold.preprocess import Preprocess

__all__ = ["Epoch", "Trainer", "Watch", "accuracy"]

U8 = NDArray[np.uint8]
EVALUATED = 256  # pictures in one forward pass of an evaluation
SETTLED = 128  # training pictures on which activations get their fractions at the end of an epoch


@dataclass
class Watch:
    """What the switch of one weight tensor looks at.

    Attributes:
        total: sum of the unit gradients since the last switch.
        count: how many.
        lookback: steps from switch to switch.
        resolution: bins of the histogram.
        nonzero: share of the leaf that is not zero.
    """

    total: Tensor
    count: int
    lookback: int
    resolution: int
    nonzero: float = 1.0


@dataclass(frozen=True)
class Epoch:
    """One epoch's means. `accuracy` is of the held-out pictures, or NaN; `words` are the bits of every weight tensor."""

    number: int
    loss: float
    accuracy: float
    rate: float
    average_word: float
    sparsity: float
    words: dict[str, int]


@dataclass
class Plateau:
    """The rate falls when the loss has not: torch's ReduceLROnPlateau, as a value."""

    rate: float
    best: float = math.inf
    bad: int = 0

    def after(self, loss: float, patience: int, threshold: float, decay: float) -> Plateau:
        if loss < self.best * (1 - threshold):
            return Plateau(self.rate, loss, 0)
        if self.bad + 1 > patience:
            return Plateau(self.rate * decay, self.best, 0)
        return Plateau(self.rate, self.best, self.bad + 1)


@dataclass
class State:
    """Where a training stands, besides its tensors."""

    step: int = 0
    strategy: Strategy = Strategy.MIN
    losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    switches: int = 0
    costs: Costs = field(default_factory=Costs)


class Trainer:
    """Args:
        images: uint8 (N, H, W, 3), as large as the preprocessing makes them.
        labels: int64 (N,).
        held_out: pictures and labels on which epochs are measured; may be empty.

    Attributes:
        identity: `checkpoint.fingerprint`, once it was asked for.

    Raises:
        InputError: labels do not fit the pictures or the network's outputs.
    """  # fmt: skip

    def __init__(
        self, network: Network, preprocess: Preprocess, images: U8, labels: NDArray[np.int64],
        held_out: tuple[U8, NDArray[np.int64]] | None = None,
    ) -> None:  # fmt: skip
        self.network, self.settings, self.preprocess = network, network.settings, preprocess
        self.images, self.labels = images, labels.astype(np.int64)
        self.held_out = held_out
        classes = network.graph.shapes[network.graph.output][-1]
        if len(labels) != len(images) or len(images) < 2 or labels.min() < 0 or labels.max() >= classes:
            raise InputError(
                f"Training needs two or more pictures, each with a label from 0 to {classes - 1}; there are {len(images)} "
                f"pictures and {len(labels)} labels from {labels.min(initial=0)} to {labels.max(initial=0)}.",
                code="labels",
            )
        s = self.settings
        self.velocity = {name: torch.zeros_like(value) for name, value in network.master.items()}
        self.watches = {
            name: Watch(torch.zeros_like(network.master[name]), 0, s.lookback[0], s.resolution[0]) for name in network.weights
        }
        self.plateau = Plateau(s.learning_rate)
        self.state = State()
        self.identity = ""
        self.macs = macs(network.graph)
        self.sizes = {name: network.master[name].numel() for name in network.weights}
        self._count()

    @property
    def micro_batch(self) -> tuple[int, int]:
        """Pictures in a forward pass, and forward passes in a step; fewer where the pictures are few."""
        accumulation = min(self.settings.accumulation, max(1, len(self.images) // 2))
        return min(self.settings.batch, len(self.images) // accumulation), accumulation

    @property
    def steps_in_epoch(self) -> int:
        batch, accumulation = self.micro_batch
        return max(1, len(self.images) // (batch * accumulation))

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.steps_in_epoch

    def run(self, after_step: Callable[[Trainer], None] = lambda trainer: None) -> None:
        """Trains to the end from wherever it stands. `after_step` is called between steps: progress and checkpoints.

        Raises:
            ModelError: the loss is no longer a number.
        """
        while self.state.step < self.steps:
            self.step()
            if self.state.step % self.steps_in_epoch == 0:
                self._end_epoch()
            after_step(self)

    def step(self) -> None:
        state, generator = self.state, generator_of(self.settings.seed, "step", self.state.step)
        observe = state.step % self.settings.refresh == 0
        loss = 0.0
        batches = list(self._batches(state.step))
        for x, y in batches:
            if self.settings.augment:
                x = augmented(x, generator)
            logits = self.network.train(x, generator, observe)
            part = F.cross_entropy(logits, y) / len(batches)
            part.backward()  # type: ignore[no-untyped-call]
            loss, observe = loss + float(part.detach()), False
        loss += self._penalties()
        if not math.isfinite(loss):
            raise ModelError(
                f"The loss of step {state.step + 1} is not a number: the training has diverged. Lower the learning rate.",
                code="diverged",
            )
        self._update(generator)
        if not self.settings.float32:
            self._add_costs()
            self._switch(loss)
        self.network.requantise(generator)
        self._count()
        state.losses.append(loss)
        state.step += 1

    def _batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, inside = divmod(step, self.steps_in_epoch)
        order = torch.randperm(len(self.images), generator=generator_of(self.settings.seed, "order", epoch)).numpy()
        batch, accumulation = self.micro_batch
        for i in range(accumulation):
            start = (inside * accumulation + i) * batch
            chosen = order[start : start + batch]
            yield torch.from_numpy(self.preprocess.apply(self.images[chosen])), torch.from_numpy(self.labels[chosen])

    def _penalties(self) -> float:
        """The loss's other terms: l1 * sum of magnitudes, and mean over tensors of (WL / 32) * share of non-zeros, which has no
        gradient and only informs the strategy."""
        net = self.network
        magnitudes = sum(float(t.detach().abs().sum()) for t in net.quantised.values())
        bits = 0.0 if self.settings.float32 else sum(net.forms[n].word / 32 * w.nonzero for n, w in self.watches.items())
        return self.settings.l1 * magnitudes + bits / len(self.watches)

    @torch.no_grad()
    def _update(self, generator: torch.Generator) -> None:
        s, net = self.settings, self.network
        for name, leaf in net.quantised.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradient = gradient + s.l1 * leaf.sign()
            if s.quantise_gradients and not s.float32:
                gradient = net.form_of(name).stochastic(gradient, generator)
            if s.unit_gradients:
                gradient = unit(gradient)
            if name in self.watches:
                watch = self.watches[name]
                watch.total += gradient if s.unit_gradients else unit(gradient)
                watch.count += 1
            master = net.master[name]
            self.velocity[name].mul_(s.momentum).add_(gradient).add_(master, alpha=s.weight_decay)
            master.sub_(self.velocity[name], alpha=self.plateau.rate)

    @torch.no_grad()
    def _switch(self, loss: float) -> None:
        """Changes the format of every weight tensor that has seen enough gradients."""
        s, net, state = self.settings, self.network, self.state
        due = [name for name, w in self.watches.items() if w.count >= w.lookback]
        if not due:
            return
        mean = sum(w.lookback for w in self.watches.values()) / len(self.watches)
        state.strategy = next_strategy(state.strategy, state.losses, loss, mean, s.progress)
        for name in due:
            watch = self.watches[name]
            diversity = gradient_diversity(watch.count, float(watch.total.norm()))
            watch.lookback = lookback_after(watch.lookback, diversity, *s.lookback, s.lookback_momentum)
            watch.resolution = resolution_after(watch.resolution, watch.lookback, *s.lookback, s.resolution)
            shorter = push_down(net.forms[name], net.master[name], watch.resolution, s.tolerance, s.bounds)
            net.forms[name] = push_up(shorter, diversity, state.strategy, net.largest(name), s.bounds)
            watch.total.zero_()
            watch.count = 0
            state.switches += 1

    def _count(self) -> None:
        for name, watch in self.watches.items():
            leaf = self.network.quantised[name]
            watch.nonzero = float(torch.count_nonzero(leaf)) / leaf.numel()

    def _add_costs(self) -> None:
        formats = {n: (self.network.forms[n].word, w.nonzero, w.lookback, w.resolution) for n, w in self.watches.items()}
        self.state.costs = self.state.costs + step_costs(formats, self.macs, self.sizes, self.micro_batch[1])

    def _end_epoch(self) -> None:
        state, s = self.state, self.settings
        part = self.images[np.unique(np.linspace(0, len(self.images) - 1, SETTLED).astype(np.int64))]
        self.network.settle(torch.from_numpy(self.preprocess.apply(part)))
        loss = float(np.mean(state.losses[-self.steps_in_epoch :]))
        measured = math.nan
        if self.held_out is not None and len(self.held_out[0]):
            measured = accuracy(self.network, self.preprocess, *self.held_out)
        words = {n: 32 if s.float32 else self.network.forms[n].word for n in self.network.weights}
        total = sum(self.sizes.values())
        word = sum(words[n] * self.sizes[n] for n in words) / total
        zeros = sum((1 - w.nonzero) * self.sizes[n] for n, w in self.watches.items()) / total
        state.epochs.append(Epoch(len(state.epochs) + 1, loss, measured, self.plateau.rate, word, zeros, words))
        self.plateau = self.plateau.after(loss, s.patience, s.threshold, s.decay)


def unit(gradient: Tensor) -> Tensor:
    """A gradient divided by its norm; zeros stay zeros."""
    norm = float(gradient.norm())
    return gradient / norm if norm > 0 else gradient


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored at random and shifted by up to an eighth of the side; what comes in from outside is the mean colour, 0."""
    n, _, height, width = x.shape
    reach = (height // 8, width // 8)
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    x = F.pad(torch.where(mirrored, x.flip(3), x), (reach[1], reach[1], reach[0], reach[0]))
    down, right = (torch.randint(0, 2 * r + 1, (n,), generator=generator) for r in reach)
    rows = (down[:, None] + torch.arange(height))[:, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, :]
    return x[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2).contiguous()


def accuracy(network: Network, preprocess: Preprocess, images: U8, labels: NDArray[np.int64]) -> float:
    """Share of pictures whose class the network chooses, evaluated as an engine computes."""
    right = 0
    for start in range(0, len(images), EVALUATED):
        x = torch.from_numpy(preprocess.apply(images[start : start + EVALUATED]))
        right += int((network.evaluate(x).argmax(1).numpy() == labels[start : start + EVALUATED]).sum())
    return right / max(len(images), 1)
