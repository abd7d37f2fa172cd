"""How tokens of one text are chosen, complete: what the caller says, over generation_config.json, over transformers' defaults.

Of a file that says `do_sample`, what it leaves out is what transformers' `generate` would take (top_k 50). Any other file says
only what it says: a caller that asks for a draw gets the whole distribution but for what file and caller cut off.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from edge.experts.decode.penalties import Bias, Repeats
from edge.experts.decode.sampling import Sampling
from refold.errors import BundleError, InputError
from refold.experts import generation

__all__ = ["FALLBACK_TOKENS", "NOTHING", "Defaults", "Plan", "damaged", "ids_of"]

FALLBACK_TOKENS = 128
FLOATS = (
    "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "max_time",
)  # fmt: skip
OFF: Mapping[str, Any] = {"min_p": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0}


@dataclass(frozen=True)
class Defaults:
    """What a bundle says of how its texts are written.

    Attributes:
        said: fields of generation_config.json, or where there is none those that transformers takes from config.json.
        notes: a sentence for each field that asks for something and is not honoured.
    """

    said: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, told: Mapping[str, Any] | None, config: Mapping[str, Any], path: str) -> Defaults:
        """Raises BundleError: a value that cannot be meant."""
        logging.set_verbosity_error()  # GenerationConfig warns of what a file leaves out
        if told is None:
            told = GenerationConfig.from_model_config(dict(config)).to_dict()
        if (wrong := generation.fault(told)) is not None:
            raise damaged(path, f"{wrong}, which cannot be meant")
        notes = tuple(generation.notes(told))
        said = {k: float(v) if k in FLOATS else v for k, v in told.items() if k in generation.HONOURED and v is not None}
        if said.get("do_sample") and "top_k" not in said:
            said["top_k"] = GenerationConfig._get_default_generation_params()["top_k"]
        return cls(said, notes)

    def config(self) -> GenerationConfig:
        """For transformers' own `generate`, as `from_pretrained` would leave it."""
        return GenerationConfig(**copy.deepcopy(dict(self.said)))

    @property
    def stop_tokens(self) -> frozenset[int]:
        return ids_of(self.said.get("eos_token_id"))


NOTHING = Defaults({})


@dataclass(frozen=True)
class Plan:
    """Attributes:
    sampling: with nothing left out that the caller or the file says. config: transformers', complete, for one prompt.
    limit: tokens at most. seconds: at most; None: no limit. draws: otherwise greedy.
    """

    sampling: Sampling
    config: GenerationConfig
    limit: int
    seconds: float | None
    draws: bool

    @classmethod
    def of(
        cls, sampling: Sampling, defaults: Defaults, before: Sequence[int], room: int | None, fallback: int = FALLBACK_TOKENS
    ) -> Plan:
        """For one text.

        Args:
            before: tokens that the decoder has read when the first is chosen. room: tokens that the model has room for behind
                the prompt. fallback: tokens where nobody says how many.

        Raises:
            InputError: the file's max_length leaves no room behind the prompt.
        """
        said = {k: v for k, v in defaults.said.items() if not (k in OFF and v == OFF[k])}
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            value = getattr(sampling, name)
            if value is not None:
                said[name] = float(value) if name in FLOATS else value
            if name in said and said[name] == OFF[name]:
                said.pop(name)
        temperature = sampling.temperature
        draws = said.get("do_sample", False) or sampling.asks_to_draw if temperature is None else temperature > 0
        warmth = said.pop("temperature", 1.0) if temperature is None else temperature
        said.pop("temperature", None)
        draws, warmth = bool(draws and warmth), float(warmth)
        limit = _limit(sampling, defaults.said, len(before), fallback)
        limit = limit if room is None else min(limit, room)
        texts = said.pop("stop_strings", ())
        stop = sampling.stop if sampling.stop is not None else (texts,) if isinstance(texts, str) else tuple(texts)
        seconds = said.pop("max_time", None)
        said |= {"do_sample": draws, "temperature": warmth or 1.0, "top_k": said.get("top_k", 0)}
        said |= {"max_new_tokens": limit, "max_length": len(before) + limit}
        if "min_new_tokens" in said:
            said["min_length"] = said["min_new_tokens"] + len(before)
        config = GenerationConfig(**copy.deepcopy(said))
        return cls(Sampling(stop=stop).over(sampling), config, limit, seconds, draws)

    def processors(self, model: PreTrainedModel, stops: frozenset[int], before: Sequence[int], prompt: Sequence[int]) -> Any:
        """transformers' own list of what changes logits, in its own order, with the caller's bias and penalties among it.

        Args:
            before: as in `of`. prompt: what the text answers; of a decoder alone, the same.
        """
        own: list[Any] = []
        s, config = self.sampling, copy.deepcopy(self.config)
        if s.logit_bias:
            own.append(Bias(s.logit_bias))
        if s.presence_penalty or s.frequency_penalty:
            own.append(Repeats(len(before), s.presence_penalty or 0.0, s.frequency_penalty or 0.0))
        config._eos_token_tensor = torch.tensor(sorted(stops)) if stops else None
        return model._get_logits_processor(
            config,
            input_ids_seq_length=len(before),
            encoder_input_ids=torch.tensor([list(prompt)]),
            logits_processor=own,
            device="cpu",
            model_kwargs={},
        )


def ids_of(value: Any) -> frozenset[int]:
    """Token ids of None, one or several; numbers below 0 are none."""
    several = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    return frozenset(int(v) for v in several if int(v) >= 0)


def _limit(sampling: Sampling, said: Mapping[str, Any], before: int, fallback: int) -> int:
    if sampling.max_tokens is not None:
        return sampling.max_tokens
    if "max_new_tokens" in said:
        return int(said["max_new_tokens"])
    if "max_length" not in said:
        return fallback
    left = int(said["max_length"]) - before
    if left < 1:
        raise InputError(
            f"The prompt has {before} tokens, and the model's {generation.FILE} allows {said['max_length']} with the answer: "
            "shorten it, or say how many tokens are wanted (max_tokens).",
            code="prompt-too-long",
        )
    return left


def damaged(path: str, why: str) -> BundleError:
    """Of a bundle whose generation_config.json cannot be followed."""
    return BundleError(f"{generation.FILE} in {path} has {why}: correct it and export again.", code="damaged")
