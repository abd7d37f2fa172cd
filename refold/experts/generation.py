"""generation_config.json as data: which of its fields a device honours, which change nothing here, which it cannot honour.

The fields are those of transformers' GenerationConfig. A device writes one text at a time, token after token: whatever belongs
to beams, batches, caches, other models that assist and what `generate` returns changes no token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FILE", "HONOURED", "fault", "notes"]

FILE = "generation_config.json"


def _is_number(low: float, high: float, *, open_low: bool = False) -> Callable[[Any], bool]:
    def right(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (low < value if open_low else low <= value) and value <= high

    return right


def _is_count(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_count(0), value))


def _is_id_or_ids(value: Any) -> bool:
    return _is_count(-1)(value) or (isinstance(value, (list, tuple)) and all(map(_is_count(-1), value)))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return (isinstance(value, str) and bool(value)) or (
        isinstance(value, list) and all(isinstance(v, str) and v for v in value)
    )


def _anything(value: Any) -> bool:
    return True


POSITIVE, SHARE = _is_number(0, math.inf, open_low=True), _is_number(0, 1)
HONOURED: Mapping[str, Callable[[Any], bool]] = {
    "max_length": _is_count(1), "max_new_tokens": _is_count(1), "min_length": _is_count(0), "min_new_tokens": _is_count(0),
    "max_time": POSITIVE, "stop_strings": _is_texts, "do_sample": _is_flag,
    "temperature": _is_number(0, math.inf), "top_k": _is_count(0), "top_p": SHARE, "min_p": SHARE, "top_h": SHARE,
    "typical_p": SHARE, "epsilon_cutoff": SHARE, "eta_cutoff": SHARE,
    "repetition_penalty": POSITIVE, "encoder_repetition_penalty": POSITIVE,
    "no_repeat_ngram_size": _is_count(0), "encoder_no_repeat_ngram_size": _is_count(0),
    "bad_words_ids": _anything, "sequence_bias": _anything, "watermarking_config": _anything,
    "exponential_decay_length_penalty": _anything, "renormalize_logits": _is_flag,
    "forced_bos_token_id": _is_count(0), "forced_eos_token_id": _is_id_or_ids,
    "suppress_tokens": _is_ids, "begin_suppress_tokens": _is_ids,
    "bos_token_id": _is_id_or_ids, "eos_token_id": _is_id_or_ids, "pad_token_id": _is_id_or_ids,
    "decoder_start_token_id": _is_id_or_ids,
}  # fmt: skip
"""Field to whether a value of it can be meant; deeper faults show when transformers builds what it asks for."""

NO_EFFECT = frozenset(
    [
        "early_stopping",
        "length_penalty",
        "diversity_penalty",
        "use_cache",
        "cache_config",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "speculation_type",
        "use_mtp",
        "compile_config",
        "disable_compile",
        "low_memory",
        "prefill_chunk_size",
        "continuous_batching_config",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
    ]
)

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "penalty_alpha": (0,), "dola_layers": (),
    "constraints": (), "force_words_ids": (), "guidance_scale": (1,), "token_healing": (False,),
    "remove_invalid_values": (False,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
}  # fmt: skip
"""What is not honoured, with the values that ask for nothing."""


def fault(told: Mapping[str, Any]) -> str | None:
    """The first field whose value cannot be meant, as `temperature is -1`; None: there is none."""
    wrong = (n for n, right in HONOURED.items() if told.get(n) is not None and not right(told[n]))
    return next((f"{name} is {str(told[name])[:60]!r}" for name in wrong), None)


def notes(told: Mapping[str, Any]) -> list[str]:
    """A sentence for every field that asks for something and is not honoured."""
    out = []
    for name, value in told.items():
        if value is None or name in HONOURED or name in NO_EFFECT or value in NEUTRAL.get(name, ()):
            continue
        what = "Refold does not do" if name in NEUTRAL else "neither Refold nor transformers knows"
        out.append(f"{FILE} asks for {name}={str(value)[:60]}, which {what}: texts are written without it.")
    return out
