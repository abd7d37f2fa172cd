"""Text that grows with the tokens and says what transformers' `decode` of prompt and completion says behind the prompt.

A token's text depends on its neighbours: SentencePiece drops the space of the first token, byte-level pieces and `<0xE2>`
tokens make a character together. So the end of what was shown, in the beginning the prompt, is decoded along, and only what
follows it is new (the method of Hugging Face's text-generation-inference and of vLLM: a prefix offset and a read offset).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

__all__ = ["Text"]

BROKEN = "\ufffd"


class Text:
    """Call `add` per token, `end` once; each gives what is new. What was given is never taken back.

    Args:
        decode: tokens to text.
        prompt: the tokens before the first. Where they end within a character, that character is new when it is complete.
        single: tokens that are one byte each, and that byte: what they mean is known when something else has come.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[Any]], str],
        prompt: Sequence[Any] = (),
        single: Mapping[Any, int] = MappingProxyType({}),
    ) -> None:
        self._decode, self._bytes = decode, single
        self._tokens = list(prompt)
        self._shown, self._from = len(self._tokens), 0  # tokens whose text is out; where the context begins
        self._before = decode(self._tokens) if self._tokens else ""
        self._run = False  # whether what is not out yet ends with bytes
        self._leave_open()

    def _leave_open(self) -> None:
        """The bytes that a prompt ends with in the middle of a character belong to what follows."""
        run = []
        for token in reversed(self._tokens):
            if token not in self._bytes:
                break
            run.append(self._bytes[token])
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(reversed(run)))
        if count := len(decoder.getstate()[0]):
            self._shown -= count
            self._before = self._decode(self._tokens[: self._shown])

    def add(self, token: Any) -> str:
        self._tokens.append(token)
        if token in self._bytes:
            self._run = True
            return ""
        if self._run and self._silent():
            return ""
        self._run = False
        new = self._new()
        if not new or new.endswith(BROKEN):
            return ""
        self._from, self._shown = self._shown, len(self._tokens)
        self._before = self._decode(self._tokens[self._from :])
        return new

    def _silent(self) -> bool:
        """Whether the last token has no text: bytes before it and behind it still make characters together."""
        return self._decode(self._tokens[self._from :]) == self._decode(self._tokens[self._from : -1])

    def end(self) -> str:
        return self._new() if self._shown < len(self._tokens) else ""

    def _new(self) -> str:
        whole, before = self._decode(self._tokens[self._from :]), self._before
        return whole[_alike(before, whole) if before.endswith(BROKEN) else len(before) :]


def _alike(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
