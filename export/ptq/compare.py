"""Float against integers at every layer's output: where the error comes in, and what is left of it further on."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.interpret import float_parameters, run, simulated, some
from export.ir import Graph
from export.quantise import IntegerModel, dequantised_parameters

__all__ = ["compare"]

PICTURES = 32
MOST = 120.0  # dB; float32 itself is not better


def compare(truth: Graph, model: IntegerModel, x: NDArray[np.float32]) -> dict[str, float]:
    """Signal to quantisation noise, dB, of every node's output, by value; both networks run on their own inputs.

    Args:
        truth: the float graph after its rules.
        model: its integers; node for node the same graph.
        x: calibration inputs, float32 (N, 3, H, W); at most 32 are used, of large ones eight.
    """
    batch = torch.from_numpy(x[some(x, PICTURES)])
    kept: dict[str, Tensor] = {}
    noise: dict[str, float] = {}
    own = simulated({a.tensor: model.scale_of(a.tensor) for a in model.table.activations})

    def keep(value: str, t: Tensor) -> Tensor:
        kept[value] = t
        return t

    def measure(value: str, t: Tensor) -> Tensor:
        t = own(value, t)
        noise[value] = _decibels(kept.pop(value), t)
        return t

    with torch.no_grad():
        run(truth, batch, float_parameters(truth), keep)
        run(model.graph, batch, dequantised_parameters(model.graph, model.weights), measure)
    return noise


def _decibels(signal: Tensor, other: Tensor) -> float:
    power, error = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in (signal, signal - other))
    if power == 0 or error <= power * 10 ** (-MOST / 10):
        return MOST
    return 10 * math.log10(power / error)
