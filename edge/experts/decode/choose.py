"""One token after another, from the model's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedModel

from edge.experts.decode.plan import Plan
from refold.errors import InputError

__all__ = ["Bias", "Chooser", "Chosen", "Repeats"]


class Chosen(NamedTuple):
    """Attributes:
    token: its id. logprob: natural logarithm of its probability, by the model's own logits, before anything changes them.
    top: the most probable tokens by them, with theirs. None and empty unless asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Of one text. The same plan, prompt and logits give the same tokens, whatever else the process does.

    Args:
        stops: token ids that end a text. before: tokens that the decoder has read. prompt: what the text answers; None: those.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        stops: frozenset[int],
        before: Sequence[int],
        prompt: Sequence[int] | None = None,
    ) -> None:
        self._plan = plan
        self._processors = plan.processors(model, stops, before, before if prompt is None else prompt)
        self._ids = torch.tensor([list(before)])
        self._generator = torch.Generator()
        if plan.sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(plan.sampling.seed)

    def choose(self, logits: torch.Tensor) -> Chosen:
        """float32 (vocabulary,) of the next token to the token.

        Raises:
            InputError: what caller and bundle ask for rules every token out.
        """
        if not self._processors and not self._plan.draws:
            return self._told(int(logits.argmax()), logits)
        scores = self._processors(self._ids, logits[None].clone())
        if not (scores > -torch.inf).any():
            raise InputError(
                "Every token is ruled out: logit_bias or generation_config.json (suppress_tokens, bad_words_ids) leave none.",
                code="no-token",
            )
        if self._plan.draws:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        self._ids = torch.cat([self._ids, torch.tensor([[token]])], 1)
        return self._told(token, logits)

    def _told(self, token: int, logits: torch.Tensor) -> Chosen:
        count = self._plan.sampling.logprobs
        if count is None:
            return Chosen(token)
        logged = logits.double().log_softmax(0)
        most = logged.topk(min(count, len(logged)))
        return Chosen(token, float(logged[token]), tuple(zip(most.indices.tolist(), most.values.tolist(), strict=True)))


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
