"""Gate look-ahead: the next layer's router on this layer's hidden state says what to read while this layer computes.

The residual stream changes little from one layer to the next, so that the next router, behind its own norm, mostly chooses
from it what it will choose later (specs: moe.md §3.1, mixtral-offloading and its successors). A guess only moves reads; what
is computed comes from the true router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from edge.experts.implementation import Paging

__all__ = ["Gate", "look_ahead"]


@dataclass(frozen=True, eq=False)
class Gate:
    """Router of one layer with the norm before it.

    Attributes:
        block: the decoder layer that both are in.
    """

    layer: int
    block: torch.nn.Module
    norm: torch.nn.Module
    router: torch.nn.Module

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """float (n, hidden) to (n, experts): what the router ranks by, groups of experts aside."""
        linear: Any = getattr(self.router, "classifier", self.router)
        behind = self.norm.forward(hidden)  # not by a call, which would run our own hook
        logits: torch.Tensor = torch.nn.functional.linear(behind, linear.weight, getattr(linear, "bias", None))
        correction: torch.Tensor | None = getattr(self.router, "e_score_correction_bias", None)
        return logits if correction is None else logits.sigmoid() + correction


def look_ahead(paging: Paging, gates: Mapping[int, Gate], count: int) -> None:
    """Hooks a model so that each layer hints the next one's experts, and the first layer its own on entry.

    Args:
        gates: of the layers with experts, in the order they run.
        count: experts in a hint.
    """
    order = list(gates.values())
    following = {gate.layer: after for gate, after in pairwise(order)}
    residual: dict[int, torch.Tensor] = {}

    def guess(gate: Gate, hidden: torch.Tensor) -> None:
        paging.pager.hint(gate.layer, gate.scores(hidden)[0].topk(count).indices.tolist())

    def keep(layer: int) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            residual.pop(layer, None)
            if args[0].shape[:-1].numel() == 1:
                residual[layer] = args[0].reshape(1, -1)

        return hook

    def enter(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[:-1].numel() == 1:
            guess(order[0], hidden.reshape(1, -1))

    def ahead(layer: int) -> None:
        gate, hidden = following.get(layer), residual.pop(layer, None)
        if gate is not None and hidden is not None:
            guess(gate, hidden)

    for layer in following:
        gates[layer].norm.register_forward_pre_hook(keep(layer))
    if order:
        order[0].block.register_forward_pre_hook(enter, with_kwargs=True)
    paging.ahead = ahead
