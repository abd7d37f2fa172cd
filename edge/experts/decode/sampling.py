"""What a caller says of how tokens are chosen; what it leaves out comes from the bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from refold.errors import UsageError

__all__ = ["MOST_LOGPROBS", "MOST_TOKENS", "Sampling"]

MOST_TOKENS = 1 << 20
MOST_LOGPROBS = 20
MOST_STOPS = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None: as the bundle's generation_config.json says, else as written here.

    Attributes:
        max_tokens: 1 to 2**20; else 128. temperature: 0 takes the most probable, up to 2 draws; else 0, or 1 where one of
            top_p, top_k or min_p asks for a draw. top_p: draws among the most probable that together reach this share, above 0
            to 1; else all. seed: of the drawing; else a fresh one.
        top_k: draws among so many; 0: among all. min_p: ... among those with this share of the most probable one's probability.
        repetition_penalty: divides (or multiplies, below 0) the logits of tokens of prompt and text; above 0, 1 is none.
        presence_penalty, frequency_penalty: taken from the logits of tokens of the text, once or for every time; -2 to 2.
        logit_bias: token to what is added to its logit, -100 to 100.
        stop: texts that end the text before them. logprobs: of the chosen token and so many of the most probable; None: none.

    Raises:
        UsageError: out of range.

    Sources: Holtzman et al. 2020 (arXiv 1904.09751), §3.1, top_p; Fan et al. 2018 (arXiv 1805.04833), §5.4, top_k; Nguyen et
    al. 2024 (arXiv 2407.01082), min_p; Keskar et al. 2019 (arXiv 1909.05858), §4.1, repetition_penalty; OpenAI's API reference,
    the other penalties and logit_bias.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def within(name: str, low: float, high: float, sentence: str, *, above: bool = False) -> None:
            value = getattr(self, name)
            if value is None:
                return
            if not (low < value if above else low <= value) or not value <= high:  # NaN is neither
                raise UsageError(f"{sentence}, not {value}.", code="out-of-range")

        within("max_tokens", 1, MOST_TOKENS, f"From 1 to {MOST_TOKENS:,} tokens are generated (max_tokens)")
        within("temperature", 0, 2, "The temperature is 0 (greedy) to 2")
        within("top_p", 0, 1, "top_p is a share above 0, at most 1", above=True)
        within("top_k", 0, 2**31, "top_k is a number of tokens, 0 for all")
        within("min_p", 0, 1, "min_p is a share, 0 to 1")
        within("repetition_penalty", 0, 1000, "repetition_penalty is above 0, at most 1000", above=True)
        within("presence_penalty", -2, 2, "presence_penalty is -2 to 2")
        within("frequency_penalty", -2, 2, "frequency_penalty is -2 to 2")
        within("logprobs", 0, MOST_LOGPROBS, f"logprobs is 0 to {MOST_LOGPROBS}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"A seed is a number from 0 to 2**63 - 1, not {self.seed}.", code="out-of-range")
        for token, bias in self.logit_bias.items():
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise UsageError(f"logit_bias of token {token} is -100 to 100, not {bias:g}.", code="out-of-range")
        if self.stop is not None and (len(self.stop) > MOST_STOPS or not all(self.stop)):
            raise UsageError(f"stop is up to {MOST_STOPS} texts, none of them empty.", code="out-of-range")

    def over(self, other: Sampling) -> Sampling:
        """This one, with what it leaves out taken from another."""
        said: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(other, **{name: value for name, value in said.items() if value is not None and value != {}})

    @property
    def asks_to_draw(self) -> bool:
        """Something is said that only a draw can mean."""
        return (self.top_p is not None and self.top_p < 1) or bool(self.top_k) or bool(self.min_p)

    def nth(self, number: int) -> Sampling:
        """For one of several texts of one request: the first is drawn as if alone, each by a seed of its own."""
        if self.seed is None or not number:
            return self
        return replace(self, seed=(self.seed + number * 0x9E3779B97F4A7C15) % 2**63)
