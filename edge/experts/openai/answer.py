"""The dictionaries of one answer: whole, or piece by piece; several texts; log probabilities in the form of either endpoint."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Choice", "Reply", "Scored"]

LEAST = -9999.0  # what OpenAI writes for a probability of nothing


class Scored(NamedTuple):
    """A token with its log probability. at: characters of the text before it. top: (token, log probability) of others."""

    token: int
    logprob: float
    at: int
    top: tuple[tuple[int, float], ...]


class Choice:
    """One text of an answer as it grows: which scored tokens belong to what was shown.

    Args:
        index: of several texts. piece: a token's own bytes. chat: the form.
    """

    def __init__(self, index: int, piece: Callable[[int], bytes], *, chat: bool) -> None:
        self.index, self.text = index, ""
        self._piece, self._chat = piece, chat
        self._waiting: list[Scored] = []
        self._scored = False

    def add(self, text: str, scored: Scored | None) -> dict[str, Any] | None:
        """More of the text. Returns the log probabilities of tokens that have begun to show; None: there are none."""
        self.text += text
        if scored is not None:
            self._waiting.append(scored)
            self._scored = True
        if not text:
            return None
        ready = [s for s in self._waiting if s.at < len(self.text)]
        self._waiting = self._waiting[len(ready) :]
        return self._told(ready)

    def rest(self, *, cut: bool) -> dict[str, Any] | None:
        """Of tokens that show nothing; of a text that was cut off before its end, none."""
        ready, self._waiting = [] if cut else self._waiting, []
        return self._told(ready)

    def _told(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not scored:
            return None
        if self._chat:
            content = [
                self._named(s.token, s.logprob) | {"top_logprobs": [self._named(*pair) for pair in s.top]} for s in scored
            ]  # fmt: skip
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(s.token) for s in scored],
            "token_logprobs": [max(s.logprob, LEAST) for s in scored],
            "top_logprobs": [
                {self._name(token): max(value, LEAST) for token, value in (*s.top, (s.token, s.logprob))} for s in scored
            ]
            if any(s.top for s in scored)
            else None,
            "text_offset": [s.at for s in scored],
        }

    def _name(self, token: int) -> str:
        """Its text; of a token that is part of a character, its bytes, as OpenAI writes them."""
        content = self._piece(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in content)

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "bytes": list(self._piece(token)), "logprob": max(logprob, LEAST)}


def joined(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The log probabilities of pieces, as those of the whole."""
    there = [p for p in parts if p is not None]
    if not there:
        return None
    return {k: None if v is None else [x for p in there for x in p[k]] for k, v in there[0].items()}


class Reply:
    """Makes the dictionaries of one answer."""

    def __init__(self, name: str, *, chat: bool) -> None:
        self._name, self._chat = name, chat
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def _head(self, piece: bool) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * piece) if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def piece(
        self, text: str, reason: str | None = None, *, first: bool = False, index: int = 0, logprobs: Any = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        if self._chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._head(True) | {"choices": [choice]}

    def costs(self, usage: Mapping[str, int]) -> dict[str, Any]:
        return self._head(True) | {"choices": [], "usage": dict(usage)}

    def choice(self, text: str, reason: str, *, index: int = 0, logprobs: Any = None) -> dict[str, Any]:
        """One text of a whole answer."""
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        return self._head(False) | {"choices": list(choices), "usage": dict(usage)}
