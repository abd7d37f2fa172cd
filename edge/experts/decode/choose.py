"""One token after another, from the model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from edge.experts.decode.plan import Defaults, Plan, damaged, ids_of
from edge.experts.decode.sampling import Sampling
from refold.errors import InputError

__all__ = ["Chooser", "Chosen", "try_out"]


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
        shares = scores.softmax(-1) if self._plan.draws else None
        if shares is not None and bool(shares.isfinite().all()):
            token = int(torch.multinomial(shares, 1, generator=self._generator))
        else:
            token = _likeliest(scores[0], logits)
        self._ids = torch.cat([self._ids, torch.tensor([[token]])], 1)
        return self._told(token, logits)

    def _told(self, token: int, logits: torch.Tensor) -> Chosen:
        count = self._plan.sampling.logprobs
        if count is None:
            return Chosen(token)
        logged = logits.double().log_softmax(0)
        most = logged.topk(min(count, len(logged)))
        return Chosen(token, float(logged[token]), tuple(zip(most.indices.tolist(), most.values.tolist(), strict=True)))


def _likeliest(scores: torch.Tensor, logits: torch.Tensor) -> int:
    """The token of the highest score. A temperature or penalty so small that float32 overflows makes several infinite: of
    these, as in the limit, the one that the model itself finds likeliest."""
    infinite = torch.isposinf(scores)
    if infinite.any():
        return int(logits.masked_fill(~infinite, -torch.inf).argmax())
    return int(scores.nan_to_num(nan=-torch.inf).argmax())


def try_out(model: PreTrainedModel, defaults: Defaults, stops: frozenset[int], path: str) -> None:
    """Chooses a token once as a bundle asks. Raises BundleError: transformers refuses a value, or it names no token."""
    size = int(model.config.vocab_size)
    for name in ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"):
        if any(token >= size for token in ids_of(defaults.said.get(name))):
            raise damaged(path, f"a {name} of {defaults.said[name]}, where the vocabulary has {size} tokens")
    try:
        Chooser(model, Plan.of(Sampling(max_tokens=2), defaults, [0], None), stops, [0]).choose(torch.zeros(size))
    except Exception as e:  # transformers raises many kinds
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise damaged(path, f"a value that transformers refuses ({first})") from e
