"""Which neurons of a feed-forward become an expert together: those that are active for the same tokens.

A neuron's profile is the size of its activation over some tokens, less its mean; profiles that point one way belong together.
(MoEfication clusters by weights, which was less good at 2 of 4 and better at 1.) Groups have equal sizes, so the k-means is
balanced: in each round the neurons that care most about their group choose first. Any order gives the same feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from export.experts.factor_router import FactoredMlp

__all__ = ["balanced", "profiles", "reorder"]

ROUNDS = 30
I64 = NDArray[np.int64]


@torch.no_grad()
def profiles(model: torch.nn.Module, seats: Sequence[FactoredMlp], ids: I64, step: Callable[[int], None]) -> list[Tensor]:
    """One pass of the dense model over windows `ids`: per layer, float32 (neurons, tokens) of length 1."""
    seen: list[list[Tensor]] = [[] for _ in seats]

    def hear(into: list[Tensor]) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: into.append(inputs[0].flatten(0, -2).abs())

    hooks = [s.down_proj.register_forward_pre_hook(hear(into)) for s, into in zip(seats, seen, strict=True)]
    try:
        for window in ids:
            model(torch.from_numpy(window[None]), use_cache=False)
            step(1)
    finally:
        for hook in hooks:
            hook.remove()
    whole = (torch.cat(parts) for parts in seen)
    return [normalize((h - h.mean(0)).T, dim=1) for h in whole]


def balanced(points: Tensor, groups: int, seed: int) -> Tensor:
    """The order that puts groups of equal size one after the other: int64 (points,), stable within a group.

    Args:
        points: (n, width) of length 1; n is a multiple of `groups`.
    """
    size = len(points) // groups
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:groups]]
    group = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(ROUNDS):
        near = points @ centres.T
        best = near.topk(2, dim=1).values
        wishes = near.argsort(dim=1, descending=True).tolist()
        left, before = [size] * groups, group.clone()
        for i in (best[:, 0] - best[:, 1]).argsort(descending=True, stable=True).tolist():
            group[i] = found = next(g for g in wishes[i] if left[g])
            left[found] -= 1
        if torch.equal(group, before):
            break
        centres = torch.stack([points[group == g].mean(0) for g in range(groups)])
    return group.argsort(stable=True)


def reorder(s: FactoredMlp, order: Tensor) -> None:
    """Puts the neurons of a dense feed-forward into `order`: it computes the same."""
    for rows in (s.gate_proj, s.up_proj):
        rows.weight.data = rows.weight.data[order]
    s.down_proj.weight.data = s.down_proj.weight.data[:, order].contiguous()
