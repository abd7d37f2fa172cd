"""Tokens, one after another: prompt in chunks, then one forward each, greedy or sampled.

    stream = Stream(model, paging, turn, stops)    a model, its experts, who lets a forward run, the ids that end a text
    stream.tokens(prompt, sampling)                yields token ids until a stop, a limit, or the caller closes the iterator

The same prompt, sampling and weights give the same tokens, whatever the pager's budget: chunks depend on the model's shape
alone, and every sum inside has a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from edge.experts.implementation import Cancelled, Paging, never
from refold.errors import InputError, ModelError, UsageError

__all__ = ["Sampling", "Stream"]

Turn = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
MOST_TOKENS = 1 << 20  # where a model itself sets no limit
CHUNK = 512  # tokens of a prompt at once: an expert is read once for all of them
CHUNK_BYTES = 32 << 20  # of all experts' outputs for a chunk, float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: 1 to 2**20. temperature: 0 takes the most probable, 0 to 2 draws. top_p: draws among the most probable that
            together reach this share, above 0 to 1. seed: of the drawing; None takes a fresh one.

    Raises:
        UsageError: out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise UsageError(f"From 1 to {MOST_TOKENS:,} tokens are generated, not {self.max_tokens}.")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise UsageError(f"The temperature is 0 (greedy) to 2, not {self.temperature:g}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is a share above 0, at most 1, not {self.top_p:g}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"A seed is a number from 0 to 2**63 - 1, not {self.seed}.")


class Stream:
    """Generates from one model, one request at a time.

    Args:
        paging: what its experts share. turn: calls a forward when no other runs, and returns what it returned.
        stops: token ids that end a text.
        threads: told the number of tokens before each forward, to divide the machine's cores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paging: Paging,
        turn: Turn,
        stops: frozenset[int],
        threads: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._model, self._paging, self._turn, self._stops, self._threads = model, paging, turn, stops, threads
        config = model.config
        self.vocabulary = int(config.vocab_size)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._encodes = bool(config.is_encoder_decoder)
        width = int(config.hidden_size) * 4 * int(getattr(config, "num_experts_per_tok", 1) or 1)
        self._chunk = max(1, min(CHUNK, CHUNK_BYTES // width))

    def room(self, prompt: Sequence[int]) -> int | None:
        """Tokens that fit behind a prompt; None: no limit.

        Raises:
            InputError: an empty prompt, one with ids that are none, or one that leaves no room.
        """
        if not prompt:
            raise InputError("The prompt is empty: give at least one character.", code="empty-prompt")
        wrong = next((i for i in prompt if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise InputError(f"The prompt has token {wrong}; the vocabulary has {self.vocabulary}.", code="token")
        if self.context is None:
            return None
        if len(prompt) >= self.context:
            raise InputError(
                f"The prompt has {len(prompt)} tokens; the model takes {self.context} with the answer: shorten it.",
                code="prompt-too-long",
            )
        return self.context - len(prompt)

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, cancelled: Callable[[], bool] = never
    ) -> Generator[int, None, None]:
        """Yields token ids as they come; the last may be a stop token.

        Args:
            cancelled: asked before every forward, and within one before every layer and expert.

        Raises:
            Cancelled: it said yes.
            InputError: see `room`.
            ModelError: the model gave no finite number.
            BundleError, StorageError: an expert could not be read; nothing was yielded from it.
        """
        room = self.room(prompt)
        limit = sampling.max_tokens if room is None else min(sampling.max_tokens, room)
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        state: dict[str, Any] = {}
        logits = torch.empty(0)
        for piece in self._pieces(prompt, state, cancelled):
            logits = self._forward(piece, state, cancelled)
        for made in range(limit):
            token = _choose(logits, sampling, generator)
            yield token
            if token in self._stops or made + 1 == limit:
                return
            logits = self._forward([token], state, cancelled)

    def probe(self) -> None:
        """One forward of one token, kept nowhere: raises ModelError when the weights give no finite number."""
        state: dict[str, Any] = {}
        self._begin([0], state)
        _finite(self._step([0], state))

    def _pieces(self, prompt: Sequence[int], state: dict[str, Any], cancelled: Callable[[], bool]) -> Iterator[Sequence[int]]:
        """What is read before the first token is chosen; an encoder reads the whole prompt here."""
        if self._encodes:
            self._run(lambda: self._begin(prompt, state), cancelled)
            yield [int(self._model.config.decoder_start_token_id)]
            return
        self._begin(prompt, state)
        for begin in range(0, len(prompt), self._chunk):
            yield prompt[begin : begin + self._chunk]

    def _begin(self, prompt: Sequence[int], state: dict[str, Any]) -> torch.Tensor:
        if not self._encodes:
            state["cache"] = DynamicCache(config=self._model.config)
            return torch.empty(0)
        with torch.inference_mode():
            state["encoder_outputs"] = self._model.get_encoder()(input_ids=torch.tensor([list(prompt)]))
        state["cache"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoded: torch.Tensor = state["encoder_outputs"][0]
        return encoded

    def _forward(self, ids: Sequence[int], state: dict[str, Any], cancelled: Callable[[], bool]) -> torch.Tensor:
        return _finite(self._run(lambda: self._step(ids, state), cancelled))

    def _run(self, step: Callable[[], torch.Tensor], cancelled: Callable[[], bool]) -> torch.Tensor:
        if cancelled():
            raise Cancelled

        def within() -> torch.Tensor:
            self._paging.cancelled = cancelled
            try:
                return step()
            finally:
                self._paging.cancelled = never

        return self._turn(within)

    def _step(self, ids: Sequence[int], state: dict[str, Any]) -> torch.Tensor:
        self._threads(len(ids))
        name, rest = ("decoder_input_ids", {}) if self._encodes else ("input_ids", {"logits_to_keep": 1})
        with torch.inference_mode():
            out = self._model(**{name: torch.tensor([list(ids)])}, **state, use_cache=True, **rest)
        last: torch.Tensor = out.logits[0, -1]
        return last


def _finite(logits: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(logits).all():
        raise ModelError(
            "The model gave a number that is not finite: its weights or its release are damaged.", code="not-finite"
        )
    return logits


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """float32 (vocabulary,) to a token id. Nucleus sampling: Holtzman et al. 2020, §3.1."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = (logits.double() / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        ranked, order = p.sort(descending=True, stable=True)
        kept = ranked.cumsum(0) - ranked < sampling.top_p
        p = torch.zeros_like(p).index_put_((order[kept],), ranked[kept])
    return int(torch.multinomial(p, 1, generator=generator))
