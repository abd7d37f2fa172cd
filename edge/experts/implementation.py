"""The experts of transformers' models, computed from paged records.

    register()                    adds "refold" to transformers' registry: models of fused experts run unchanged
    Paging(pager, geometry)       what the experts of one model share
    Paging.experts(...)           one layer's experts for n tokens, the same bits whatever the cache holds
    SwitchExperts                 takes the place of Switch's ModuleDict, which has no registry

The parameters that transformers gives an experts module stay on the meta device and are dropped: nothing of an expert is in
memory but packed records in the pager.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from edge.experts import kernel
from edge.experts.kernel.crew import Crew
from edge.experts.weights.interface import check_fused
from refold.errors import ModelError
from refold.experts import Geometry, decode

__all__ = ["NAME", "Cancelled", "Paging", "Records", "SwitchExperts", "never", "paged_experts", "register", "take_seat"]

NAME = "refold"
SEAT = "refold_seat"

Wave = tuple[list[int], list[NDArray[np.uint8]]]


class Records(Protocol):
    """What is asked of a pager."""

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[Wave]: ...
    def hint(self, layer: int, experts: Sequence[int]) -> None: ...


class Cancelled(Exception):  # noqa: N818 - not an error: whoever asked has gone
    """A generation was told to end."""


def never() -> bool:
    return False


class Paging:
    """What the experts modules of one model share. Not thread-safe: one forward at a time.

    Args:
        pager: gives records; see `edge.experts.pager`.
        crew: threads that share out a layer's experts; None: the caller alone.

    Attributes:
        ahead: called once a layer's reads have begun, to say what the next layer will want; see implementation_lookahead.py.
        cancelled: asked before every layer and every expert; True ends the forward.
    """

    def __init__(self, pager: Records, geometry: Geometry, crew: Crew | None = None) -> None:
        self.pager, self.geometry, self.crew = pager, geometry, crew
        self.ahead: Callable[[int], None] | None = None
        self.cancelled: Callable[[], bool] = never

    def experts(self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sum over j of weights[:, j] * expert(index[:, j])(x), in the order of j.

        Each expert is read once, for all of its tokens; of several tokens, the experts with the most of them first. Those in
        memory are computed while others come. Only the sum at the end mixes experts, so that their order of arrival cannot
        show in the result.

        Args:
            x: float32 (n, hidden). index: int64 (n, k). weights: float (n, k).

        Returns:
            float32 (n, hidden).

        Raises:
            BundleError: a record is not what the index says. StorageError: the disk failed. Cancelled: see
                the attribute.
        """
        self._go_on()
        users: dict[int, tuple[list[int], list[int]]] = {}
        for row, chosen in enumerate(index.tolist()):
            for place, expert in enumerate(chosen):
                rows, places = users.setdefault(expert, ([], []))
                rows.append(row)
                places.append(place)
        order = sorted(users, key=lambda e: -len(users[e][0]))
        out = x.new_zeros(index.shape[0], index.shape[1], x.shape[1])
        ahead = self.ahead

        def one(known: tuple[int, NDArray[np.uint8]]) -> None:
            self._go_on()
            expert, record = known
            rows, places = users[expert]
            if len(x) == 1:
                out[0, places[0]] = self._one(layer, expert, record, x)[0]
            else:
                out[rows, places] = self._one(layer, expert, record, x[rows])

        with closing(cast("Generator[Wave, None, None]", self.pager.waves(layer, order))) as waves:
            for experts, records in waves:
                if ahead is not None:
                    ahead(layer)
                    ahead = None
                kernel.each(one, zip(experts, records, strict=True), self.crew)
        return _sum(out, weights)

    def _go_on(self) -> None:
        if self.cancelled():
            raise Cancelled

    def _one(self, layer: int, expert: int, record: NDArray[np.uint8], x: torch.Tensor) -> torch.Tensor:
        g = self.geometry
        return kernel.expert(decode(record, g.shapes, layer, expert), x, g.gated, g.activation)


def _sum(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(n, k, hidden) and (n, k) to (n, hidden): place after place, so that one token and many round alike."""
    weights = weights.to(out.dtype)
    total = out[:, 0] * weights[:, :1]
    for place in range(1, out.shape[1]):
        total += out[:, place] * weights[:, place : place + 1]
    return total


def paged_experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' signature of an experts implementation; `self` is the experts module, which has taken its seat."""
    seat: tuple[Paging, int] | None = self.__dict__.get(SEAT)
    if seat is None:
        raise ModelError(
            "These experts were never given a pager: load the model with edge.experts.model.load, not from_pretrained."
        )
    return seat[0].experts(seat[1], hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Makes `experts_implementation="refold"` known to transformers. Doing it twice does no harm."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, paged_experts)


def take_seat(module: torch.nn.Module, paging: Paging, layer: int) -> None:
    """Binds a fused experts module to its records and drops its parameters, which were never more than shapes.

    Raises:
        ModelError: the module computes something else than these records do.
    """
    check_fused(module, paging.geometry)
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        setattr(module, name, None)
    module.__dict__[SEAT] = (paging, layer)


class SwitchExperts(torch.nn.Module):
    """Switch's experts by its own call: one-hot choices, of which a token beyond an expert's capacity has none."""

    def __init__(self, paging: Paging, layer: int) -> None:
        super().__init__()
        self.__dict__[SEAT] = (paging, layer)

    def forward(self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor) -> Any:
        """hidden_states (n, hidden), selected_experts 0 or 1 (n, 1, experts), routing_weights (n, 1) to (n, hidden)."""
        paging, layer = self.__dict__[SEAT]
        choices = selected_experts[:, 0]
        kept = choices.sum(-1).nonzero()[:, 0]
        out = torch.zeros_like(hidden_states)
        if len(kept):
            index = choices[kept].argmax(-1, keepdim=True)
            out[kept] = paging.experts(layer, hidden_states[kept], index, routing_weights[kept])
        return out
