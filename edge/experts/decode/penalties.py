"""What OpenAI's requests do to logits and transformers has no processor for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LogitsProcessor

__all__ = ["Bias", "Repeats"]


class Bias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the logits of some tokens. Args: `bias`: by token id; numbers that are no token of the vocabulary are refused."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens = torch.tensor(list(bias))
        self._values = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_add(1, self._tokens, self._values[None])


class Repeats(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's presence and frequency penalties, of the tokens written so far; the prompt's do not count.

    Args:
        start: where the text begins.
    """

    def __init__(self, start: int, presence: float, frequency: float) -> None:
        self._start, self._presence, self._frequency = start, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        count = torch.bincount(input_ids[0, self._start :], minlength=scores.shape[1]).to(scores.dtype)
        return scores - (self._presence * (count > 0) + self._frequency * count)
