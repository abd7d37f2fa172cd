"""What OpenAI's clients send and expect, as values: requests checked field by field, answers and their pieces as dictionaries.

Only what changes the text and is not supported is refused; fields nobody knows are ignored, as clients send many.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.experts.generate import Sampling
from refold.errors import RefoldError, UsageError

__all__ = ["Refusal", "Reply", "Request", "Stops", "error", "models", "parse", "refusal_of"]

DEFAULT_TOKENS = {"completion": 16, "chat": 256}
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip


class Refusal(Exception):  # noqa: N818 - an answer to a client
    """A request that is answered with an error.

    Args:
        status: of HTTP. kind: OpenAI's error type. code: stable, kebab-case. param: the field at fault.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind


def refusal_of(e: RefoldError) -> Refusal:
    """An error of Refold as an answer: a wrong request is 400, a refused release 403, the rest is the server's fault."""
    if e.exit_code in (2, 3):
        return Refusal(400, e.message, code=e.code)
    if e.exit_code == 6:
        return Refusal(403, e.message, code=e.code, kind="release_refused")
    return Refusal(500, e.message, code=e.code, kind="server_error")


def error(e: Refusal) -> dict[str, Any]:
    return {"error": {"message": e.message, "type": e.kind, "param": e.param, "code": e.code}}


def models(name: str, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "refold"}


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        prompt: text or token ids; of a chat, empty. messages: of a chat, role and content each. stops: texts that end the
            answer. usage: the stream ends with what it cost.
    """

    prompt: str | tuple[int, ...]
    messages: tuple[Mapping[str, str], ...]
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def parse(body: bytes, *, chat: bool, name: str, defaults: Sampling) -> Request:
    """Raises Refusal: no JSON, another model, a wrong type, a value out of range, or something that is not supported."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"The body is not JSON: {e}.", code="bad-json") from e
    if not isinstance(told, dict):
        raise Refusal(400, "The body is a JSON object.", code="bad-json")
    told = {k: v for k, v in told.items() if v is not None}
    wanted = _field(told, "model", str, name)
    if wanted != name:
        raise Refusal(404, f"There is no model {wanted!r} here; it is called {name!r}.", code="model_not_found", param="model")
    for field, neutral in NEUTRAL.items():
        if field in told and told[field] not in neutral:
            raise Refusal(400, f"{field} is not supported.", code="unsupported", param=field)
    prompt: str | tuple[int, ...] = ""
    messages: tuple[Mapping[str, str], ...] = ()
    if chat:
        messages = _messages(told.get("messages"))
    else:
        prompt = _prompt(told.get("prompt"))
    options = _field(told, "stream_options", dict, {})
    tokens = _field(told, "max_tokens", int, DEFAULT_TOKENS["chat" if chat else "completion"])
    tokens = _field(told, "max_completion_tokens", int, tokens)
    return Request(
        prompt,
        messages,
        _sampling(told, tokens, defaults),
        _stops(told.get("stop", [])),
        _field(told, "stream", bool, False),
        _field(options, "include_usage", bool, False),
    )


def _field(told: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = told.get(name, default)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right:
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
        raise Refusal(400, f"{name} is {names[kind]}, not {str(value)[:50]!r}.", code="wrong-type", param=name)
    return value


def _sampling(told: Mapping[str, Any], tokens: int, defaults: Sampling) -> Sampling:
    try:
        return Sampling(
            max_tokens=tokens,
            temperature=float(_field(told, "temperature", float, defaults.temperature)),
            top_p=float(_field(told, "top_p", float, defaults.top_p)),
            seed=_field(told, "seed", int, defaults.seed) if told.get("seed", defaults.seed) is not None else None,
        )
    except UsageError as e:
        raise Refusal(400, e.message, code="out-of-range") from e
    except OverflowError as e:
        raise Refusal(400, "A number is too large.", code="out-of-range") from e


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return tuple(value)
    raise Refusal(400, "prompt is one text or one list of token ids.", code="wrong-type", param="prompt")


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise Refusal(400, "messages is a list of at least one message.", code="wrong-type", param="messages")
    out = []
    for i, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise Refusal(400, f"messages[{i}] is an object with role and content.", code="wrong-type", param="messages")
        out.append({"role": role, "content": _content(message.get("content"), i)})
    return tuple(out)


def _content(value: Any, i: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "".join(p["text"] for p in value)
    raise Refusal(
        400, f"The content of messages[{i}] is text; other media are not supported.", code="wrong-type", param="messages"
    )


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > 4 or not all(isinstance(v, str) and v for v in values):
        raise Refusal(400, "stop is a text or a list of up to four.", code="wrong-type", param="stop")
    return tuple(values)


class Stops:
    """Cuts a growing text at the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def add(self, text: str) -> str:
        """What may be shown. After `found` nothing more is."""
        if self.found:
            return ""
        self._held += text
        at = min((i for i in (self._held.find(s) for s in self._stops) if i >= 0), default=-1)
        if at >= 0:
            self.found = True
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((n for s in self._stops for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        shown, self._held = self._held, ""
        return shown


class Reply:
    """Makes the dictionaries of one answer."""

    def __init__(self, name: str, *, chat: bool) -> None:
        self._name, self._chat = name, chat
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def _head(self, piece: bool) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * piece) if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def piece(self, text: str, reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._head(True) | {"choices": [choice]}

    def costs(self, usage: Mapping[str, int]) -> dict[str, Any]:
        return self._head(True) | {"choices": [], "usage": dict(usage)}

    def whole(self, text: str, reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return self._head(False) | {"choices": [choice], "usage": dict(usage)}
