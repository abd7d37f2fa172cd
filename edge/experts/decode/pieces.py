"""What single tokens of a tokenizer are, as bytes: for log probabilities, and to know which tokens are bytes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

__all__ = ["Pieces"]

SPACE = "\u2581"  # SentencePiece's sign for it


class Pieces:
    """Of transformers' tokenizer.

    Attributes:
        bytes_of: the tokens that are one byte each (`<0xE2>`), and that byte; empty where the tokenizer joins bytes otherwise.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = _kinds(json.loads(decoder.__getstate__()) if decoder is not None else None)
        self._byte_level = "ByteLevel" in kinds
        self.bytes_of: dict[int, int] = {}
        if "ByteFallback" in kinds:
            for byte in range(256):
                name = f"<0x{byte:02X}>"
                token = tokenizer.convert_tokens_to_ids(name)
                if isinstance(token, int) and tokenizer.convert_ids_to_tokens(token) == name:
                    self.bytes_of[token] = byte

    def __getitem__(self, token: int) -> bytes:
        """Empty for a number that is no token."""
        if token in self.bytes_of:
            return bytes([self.bytes_of[token]])
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except (OverflowError, IndexError):
            return b""
        if not isinstance(name, str):
            return b""
        if token in self._added:
            return name.encode()
        if self._byte_level and all(c in _byte_letters() for c in name):
            return bytes(_byte_letters()[c] for c in name)
        return name.replace(SPACE, " ").encode()


def _kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    return {str(decoder.get("type"))}.union(*map(_kinds, decoder.get("decoders", ())))


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letter for every byte: itself where it prints, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
