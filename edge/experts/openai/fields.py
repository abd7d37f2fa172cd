"""Every field that a request may carry: honoured, without effect on a text, or refused by name; also the fields nobody knows.

Sources: OpenAI's API reference (completions, chat completions); top_k, min_p and repetition_penalty as vLLM's server has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["Refusal", "body_of", "check", "field"]

BOTH = frozenset(
    [
        "model",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "n",
        "logprobs",
    ]
)
HONOURED = {False: BOTH | {"prompt", "best_of"}, True: BOTH | {"messages", "top_logprobs"}}
NO_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",
    ]
)
"""They say who asks, or how a server far away may save time."""
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "echo": (False,), "suffix": ("",), "best_of": (1,), "top_logprobs": (0,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "store": (False,), "service_tier": ("auto", "default"), "verbosity": ("medium",),
    "reasoning_effort": ("none",),
}  # fmt: skip
"""Not supported, with the values that ask for nothing."""
STREAM_OPTIONS: Mapping[str, tuple[object, ...]] = {"include_obfuscation": (False,)}
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}


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


def body_of(content: bytes) -> dict[str, Any]:
    """The fields that a request says; null says nothing. Raises Refusal: no JSON object, or a field said twice."""
    try:
        told = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"The body is not JSON: {e}.", code="bad-json") from e
    if not isinstance(told, dict):
        raise Refusal(400, "The body is a JSON object.", code="bad-json")
    return {k: v for k, v in told.items() if v is not None}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise Refusal(400, f"The body says {name[:100]} twice.", code="bad-json", param=name[:100])
        out[name] = value
    return out


def check(told: Mapping[str, Any], *, chat: bool) -> None:
    """Raises Refusal: a field that would change the text, or that nobody knows, is not supported here."""
    for name, value in told.items():
        if name not in HONOURED[chat] and name not in NO_EFFECT and not asks_nothing(value, NEUTRAL.get(name, ())):
            raise unsupported(name)
    for name, value in field(told, "stream_options", dict, {}).items():
        if name != "include_usage" and value is not None and not asks_nothing(value, STREAM_OPTIONS.get(name, ())):
            raise unsupported(f"stream_options.{name}")
    if "stream_options" in told and not told.get("stream"):
        raise Refusal(400, "stream_options belongs to a stream: say stream.", code="contradiction", param="stream_options")


def asks_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether it is one of these values, and of its type: 0 is not false."""
    return any(type(value) is type(n) and value == n for n in neutral)


def unsupported(name: str) -> Refusal:
    return Refusal(400, f"{name[:100]} is not supported.", code="unsupported", param=name[:100])


def field(told: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of one type, or what stands for it. Raises Refusal: another type."""
    value = told.get(name, default)
    if value is default:
        return value
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not right:
        raise Refusal(400, f"{name} is {NAMES[kind]}, not {str(value)[:50]!r}.", code="wrong-type", param=name)
    return value
