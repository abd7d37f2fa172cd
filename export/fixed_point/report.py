"""What a fixed-point training came to: bits, zeros, size, and the paper's analytical model of its cost.

The model counts multiplications times bits (arXiv 2107.13490; docs/guide/fixed-point.md has the formulae). It is what every
speed-up in the paper is, and it is not a latency: no processor here has multipliers of 11 bits. Measured times stand beside it,
never for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refold.atomic import write_atomically

if TYPE_CHECKING:
    from export.fixed_point.train import Epoch, Trainer

__all__ = ["Costs", "Layer", "Report", "plot", "report", "step_costs"]

FULL = 32  # bits of the float32 everything is compared with


@dataclass(frozen=True)
class Costs:
    """Multiplications times bits, summed over steps: of the quantised forward passes with their switches, and in float32."""

    quantised: float = 0.0
    full: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(self.quantised + other.quantised, self.full + other.full)


def step_costs(
    formats: Mapping[str, tuple[int, float, int, int]], macs: Mapping[str, int], sizes: Mapping[str, int], accumulation: int
) -> Costs:
    """One step's costs.

    A switch of a tensor of T values costs 3 T · 2 log2(WL - 8) · r · nz for the bisections (log2 at least 1: words of up to
    10 bits), (lookback + 1) T + 1 for the gradients' sum; it is spread over lookback · accumulation forward passes and counted
    at 32 bits. A forward pass is one picture's, as published; with whole batches the switches would weigh less.

    Args:
        formats: word, share of non-zeros, lookback and resolution by tensor.
    """
    quantised = full = 0.0
    for name, (word, nonzero, lookback, resolution) in formats.items():
        size = sizes[name]
        overhead = 3 * size * 2 * max(math.log2(max(word - 8, 1)), 1.0) * resolution * nonzero + (lookback + 1) * size + 1
        quantised += nonzero * (macs[name] * word + FULL * overhead / (lookback * accumulation))
        full += FULL * macs[name]
    return Costs(quantised, full)


@dataclass(frozen=True)
class Layer:
    """One weight tensor: its format, values, share of zeros and multiplications for one picture."""

    name: str
    word: int
    fraction: int
    size: int
    sparsity: float
    macs: int


@dataclass(frozen=True)
class Report:
    """Attributes:
    average_word: bits, weighted by the tensors' sizes.
    sparsity: share of exact zeros among all weights.
    size_ratio: bits of the non-zero weights over 32 bits for every weight (zeros free, as the paper counts them).
    size_ratio_with_zeros: the same with every weight stored: average_word / 32.
    size_ratio_unweighted: as published: the mean over tensors, whatever their size.
    modelled_training_speed_up, modelled_inference_speed_up: of the analytical model; NOT latency.
    """

    layers: tuple[Layer, ...]
    average_word: float
    sparsity: float
    size_ratio: float
    size_ratio_with_zeros: float
    size_ratio_unweighted: float
    modelled_training_speed_up: float
    modelled_inference_speed_up: float
    loss: float
    accuracy: float
    steps: int
    switches: int

    def encode(self) -> dict[str, object]:
        """For `--json`; NaN, which JSON does not have, becomes null."""
        values = {k: v for k, v in asdict(self).items() if k != "layers"}
        rows = [asdict(layer) for layer in self.layers]
        return {**{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}, "layers": rows}


def report(trainer: Trainer) -> Report:
    net = trainer.network
    layers = []
    for name, watch in trainer.watches.items():
        form = net.forms[name]
        word = FULL if net.settings.float32 else form.word
        layers.append(Layer(name, word, form.fraction, trainer.sizes[name], 1 - watch.nonzero, trainer.macs[name]))
    total = sum(layer.size for layer in layers)
    stored = sum(layer.word * layer.size for layer in layers)
    kept = sum(layer.word * layer.size * (1 - layer.sparsity) for layer in layers)
    costs, last = trainer.state.costs, trainer.state.epochs[-1] if trainer.state.epochs else None
    busy = sum(layer.macs * layer.word * (1 - layer.sparsity) for layer in layers)
    return Report(
        layers=tuple(layers),
        average_word=stored / total,
        sparsity=sum(layer.sparsity * layer.size for layer in layers) / total,
        size_ratio=kept / (FULL * total),
        size_ratio_with_zeros=stored / (FULL * total),
        size_ratio_unweighted=sum(layer.word * (1 - layer.sparsity) for layer in layers) / (FULL * len(layers)),
        # The backward pass stays in float32 and is as long as the forward one in this model.
        modelled_training_speed_up=2 * costs.full / (costs.quantised + costs.full) if costs.full else 1.0,
        modelled_inference_speed_up=FULL * sum(layer.macs for layer in layers) / busy if busy else math.inf,
        loss=last.loss if last else math.nan,
        accuracy=last.accuracy if last else math.nan,
        steps=trainer.state.step,
        switches=trainer.state.switches,
    )


def plot(epochs: list[Epoch], path: Path) -> None:
    """Loss, accuracy and word lengths over the epochs, as PNG. Raises StorageError when it cannot be written."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    numbers = [e.number for e in epochs]
    left.plot(numbers, [e.loss for e in epochs], label="loss")
    left.set_xlabel("epoch")
    left.set_ylabel("loss")
    if any(math.isfinite(e.accuracy) for e in epochs):
        other = left.twinx()
        other.plot(numbers, [100 * e.accuracy for e in epochs], color="#d0342c", label="accuracy")
        other.set_ylabel("held-out accuracy, %")
    for name in epochs[0].words if epochs else ():
        right.plot(numbers, [e.words[name] for e in epochs], color="#999999", linewidth=0.7)
    right.plot(numbers, [e.average_word for e in epochs], color="#1f4e9c", linewidth=2, label="mean, weighted by size")
    right.plot(numbers, [32 * e.sparsity for e in epochs], color="#2c8a3d", linestyle="--", label="zeros (32 = all)")
    right.set_xlabel("epoch")
    right.set_ylabel("word length, bits")
    right.set_ylim(0, 33)
    right.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    write_atomically(path, [out.getvalue()])
