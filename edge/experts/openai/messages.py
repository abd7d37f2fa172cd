"""A conversation, checked message by message: role and text; whatever else a message carries is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.experts.openai.fields import Refusal, asks_nothing, unsupported

__all__ = ["messages_of"]

NEUTRAL: Mapping[str, tuple[object, ...]] = {"tool_calls": ([],), "annotations": ([],), "refusal": ("",)}


def messages_of(value: Any) -> tuple[Mapping[str, str], ...]:
    """Raises Refusal: no list of messages, something else than text, or a field that is not supported."""
    if not isinstance(value, list) or not value:
        raise Refusal(400, "messages is a list of at least one message.", code="wrong-type", param="messages")
    out = []
    for i, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role:
            raise Refusal(400, f"messages[{i}] is an object with role and content.", code="wrong-type", param="messages")
        _only(message, ("role", "content"), f"messages[{i}]")
        out.append({"role": role, "content": _content(message.get("content"), i)})
    return tuple(out)


def _content(value: Any, i: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        for part in value:
            _only(part, ("type", "text"), f"messages[{i}].content")
        if all(part.get("type", "text") == "text" for part in value):
            return "".join(part["text"] for part in value)
    raise Refusal(
        400, f"The content of messages[{i}] is text; other media are not supported.", code="wrong-type", param="messages"
    )


def _only(told: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name, value in told.items():
        if name not in known and value is not None and not asks_nothing(value, NEUTRAL.get(name, ())):
            refusal = unsupported(f"{where}.{name}")
            refusal.param = "messages"
            raise refusal
