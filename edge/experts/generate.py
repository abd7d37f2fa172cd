"""Tokens, one after another: prompt in chunks, then one forward each, greedy or sampled.

    stream = Stream(model, paging, turn, stops)    a model, its experts, who lets a forward run, the ids that end a text
    stream.plan(prompt, sampling)                  how its tokens will be chosen: decode/plan.py
    stream.tokens(prompt, plan)                    yields tokens until a stop, a limit, or the caller closes the iterator

The same prompt, plan and weights give the same tokens, whatever the pager's budget: chunks depend on the model's shape
alone, and every sum inside has a fixed order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from edge.experts.decode.choose import Chooser, Chosen
from edge.experts.decode.plan import FALLBACK_TOKENS, NOTHING, Defaults, Plan, ids_of
from edge.experts.decode.sampling import Sampling
from edge.experts.implementation import Cancelled, Paging, never
from refold.errors import InputError, ModelError

__all__ = ["Sampling", "Stream"]

Turn = Callable[[Callable[[], torch.Tensor]], torch.Tensor]
CHUNK = 512  # tokens of a prompt at once: an expert is read once for all of them
CHUNK_BYTES = 32 << 20  # of all experts' outputs for a chunk, float32


class Stream:
    """Generates from one model, one request at a time.

    Args:
        paging: what its experts share. turn: calls a forward when no other runs, and returns what it returned.
        stops: token ids that end a text. defaults: what the bundle says of how its texts are written.
        threads: told the number of tokens before each forward, to divide the machine's cores.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paging: Paging,
        turn: Turn,
        stops: frozenset[int],
        threads: Callable[[int], None] = lambda tokens: None,
        defaults: Defaults = NOTHING,
    ) -> None:
        self._model, self._paging, self._turn, self._stops, self._threads = model, paging, turn, stops, threads
        config = model.config
        self.vocabulary = int(config.vocab_size)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._encodes = bool(config.is_encoder_decoder)
        self._defaults = defaults
        starts = ids_of(defaults.said.get("decoder_start_token_id", defaults.said.get("bos_token_id")))
        self._start = min(starts) if starts else int(getattr(config, "decoder_start_token_id", None) or 0)
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

    def plan(self, prompt: Sequence[int], sampling: Sampling, fallback: int = FALLBACK_TOKENS) -> Plan:
        """What a text of this prompt will be chosen by. fallback: tokens where neither caller nor bundle says how many.

        Raises:
            InputError: see `room`; a bias of a token that is none; the bundle's own max_length leaves no room.
        """
        room = self.room(prompt)
        wrong = next((i for i in sampling.logit_bias if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise InputError(f"logit_bias names token {wrong}; the vocabulary has {self.vocabulary}.", code="token")
        return Plan.of(sampling, self._defaults, self._before(prompt), room, fallback)

    def _before(self, prompt: Sequence[int]) -> Sequence[int]:
        """What the decoder has read when the first token is chosen."""
        return [self._start] if self._encodes else prompt

    def tokens(self, prompt: Sequence[int], plan: Plan, cancelled: Callable[[], bool] = never) -> Generator[Chosen, None, None]:
        """Yields tokens as they come; the last may be a stop token.

        Args:
            plan: of this prompt.
            cancelled: asked before every forward, and within one before every layer and expert.

        Raises:
            Cancelled: it said yes.
            InputError: every token is ruled out.
            ModelError: the model gave no finite number.
            BundleError, StorageError: an expert could not be read; nothing was yielded from it.
        """
        begun = time.monotonic()
        chooser = Chooser(self._model, plan, self._stops, self._before(prompt), prompt)
        state: dict[str, Any] = {}
        logits = torch.empty(0)
        for piece in self._pieces(prompt, state, cancelled):
            logits = self._forward(piece, state, cancelled)
        for made in range(plan.limit):
            chosen = chooser.choose(logits)
            yield chosen
            late = plan.seconds is not None and time.monotonic() - begun > plan.seconds
            if chosen.token in self._stops or late or made + 1 == plan.limit:
                return
            logits = self._forward([chosen.token], state, cancelled)

    def probe(self) -> None:
        """One forward of one token, kept nowhere: raises ModelError when the weights give no finite number."""
        state: dict[str, Any] = {}
        self._begin([0], state)
        _finite(self._step([0], state))

    def _pieces(self, prompt: Sequence[int], state: dict[str, Any], cancelled: Callable[[], bool]) -> Iterator[Sequence[int]]:
        """What is read before the first token is chosen; an encoder reads the whole prompt here."""
        if self._encodes:
            self._run(lambda: self._begin(prompt, state), cancelled)
            yield [self._start]
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
