"""Group progressive guidance (EQ-Net eq. 7-8): each step runs high, random, low, each taught by the one run just before it.

    L_H = CE(y_H, y)
    L_R = lam KL(y_H -> y_R) + (1 - lam) CE(y_R, y)
    L_L = lam KL(y_R -> y_L) + (1 - lam) CE(y_L, y)

Gradients of all add up; only one subnet's activations are held at a time. The float model that the training started from may
teach the highest, on the pictures it is right about: else few pictures and narrow subnets pull the wide ones away from what
the model knew. That is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from export.elastic.layout import Layout
from export.elastic.space import Configuration, Space
from export.elastic.supernet import Supernet

__all__ = ["guide", "sandwich"]


def sandwich(space: Space, layout: Layout, rng: np.random.Generator, subnets: int = 3) -> list[Configuration]:
    """Widest first, narrowest last, `subnets` - 2 at random between; granularity and symmetry at random in all."""
    return [space.draw(layout, rng, bits) for bits in ("max", *["random"] * (subnets - 2), "min")]


def guide(
    supernet: Supernet, x: Tensor, y: Tensor, order: Sequence[Configuration], lam: float = 0.5, first: Tensor | None = None
) -> list[float]:
    """Adds every subnet's gradients to those of the supernet's learned tensors; returns the losses in order.

    Args:
        x: float32 (N, 3, H, W); y: int64 (N,).
        first: logits of the float model, float32 (N, classes), which teach the first subnet where they are right.
    """
    teacher, share = first, torch.zeros(len(y))
    if first is not None:
        share = lam * (first.argmax(1) == y)
    losses = []
    for configuration in order:
        logits = supernet(x, configuration)
        loss = F.cross_entropy(logits, y, reduction="none")
        if teacher is not None:
            distance = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
            loss = share * distance + (1 - share) * loss
        loss, share = loss.mean(), torch.full_like(share, lam)
        torch.autograd.backward(loss)
        teacher = logits.detach()
        losses.append(float(loss.detach()))
    return losses
