"""Text that grows with the tokens and says what transformers' `decode` of prompt and completion says behind the prompt.

A token's text depends on its neighbours: SentencePiece drops the space of the first token, byte-level pieces and `<0xE2>`
tokens make a character together. So the end of what was shown, in the beginning the prompt, is decoded along, and only what
follows it is new (the method of Hugging Face's text-generation-inference and of vLLM: a prefix offset and a read offset).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Text"]

BROKEN = "\ufffd"


class Text:
    """Call `add` per token, `end` once; each gives what is new. What was given is never taken back.

    Args:
        decode: tokens to text.
        prompt: the tokens before the first. Where they end within a character, that character is new when it is complete.
        unfinished: says of a token that what it means is known when the next one has come, as of bytes that are a token each.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[Any]], str],
        prompt: Sequence[Any] = (),
        unfinished: Callable[[Any], bool] = lambda token: False,
    ) -> None:
        self._decode, self._unfinished = decode, unfinished
        self._tokens = list(prompt)
        self._shown, self._from = len(self._tokens), 0  # tokens whose text is out; where the context begins
        self._before = decode(self._tokens) if self._tokens else ""

    def add(self, token: Any) -> str:
        self._tokens.append(token)
        if self._unfinished(token):
            return ""
        new = self._new()
        if not new or new.endswith(BROKEN):
            return ""
        self._from, self._shown = self._shown, len(self._tokens)
        self._before = self._decode(self._tokens[self._from :])
        return new

    def end(self) -> str:
        return self._new() if self._shown < len(self._tokens) else ""

    def _new(self) -> str:
        whole, before = self._decode(self._tokens[self._from :]), self._before
        return whole[_alike(before, whole) if before.endswith(BROKEN) else len(before) :]


def _alike(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
