"""Requests of OpenAI's clients, checked field by field.

Whatever would change the text and is not supported is refused by name, fields that nobody knows among it: edge/experts/openai/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge.experts.decode.sampling import MOST_LOGPROBS, Sampling
from edge.experts.decode.stops import Stops
from edge.experts.openai.answer import Choice, Reply, Scored, joined
from edge.experts.openai.fields import Refusal, body_of, check, field
from edge.experts.openai.messages import messages_of
from refold.errors import RefoldError, UsageError

__all__ = [
    "DEFAULT_TOKENS", "Choice", "Refusal", "Reply", "Request", "Scored", "Stops", "error", "joined", "model", "models", "parse",
    "refusal_of",
]  # fmt: skip

DEFAULT_TOKENS = {False: 16, True: 256}  # of a completion, of a chat
MOST_TEXTS = 16  # of one request
MOST_COMPLETION_LOGPROBS = 5


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
        prompt: text or token ids; of a chat, empty. messages: of a chat, role and content each.
        sampling: over the server's own. texts: how many answers. tokens: of each, where neither request nor server nor model
            says. usage: the stream ends with what it cost.
    """

    chat: bool
    prompt: str | tuple[int, ...]
    messages: tuple[Mapping[str, str], ...]
    sampling: Sampling
    texts: int
    tokens: int
    stream: bool
    usage: bool


def parse(body: bytes, *, chat: bool, name: str, defaults: Sampling) -> Request:
    """Raises Refusal: no JSON, another model, a wrong type, a value out of range, or something that is not supported."""
    told = body_of(body)
    wanted = field(told, "model", str, name)
    if wanted != name:
        raise Refusal(404, f"There is no model {wanted!r} here; it is called {name!r}.", code="model_not_found", param="model")
    check(told, chat=chat)
    return Request(
        chat,
        "" if chat else _prompt(told.get("prompt")),
        messages_of(told.get("messages")) if chat else (),
        _sampling(told, chat).over(defaults),
        _texts(told),
        DEFAULT_TOKENS[chat],
        field(told, "stream", bool, False),
        field(field(told, "stream_options", dict, {}), "include_usage", bool, False),
    )


def _sampling(told: Mapping[str, Any], chat: bool) -> Sampling:
    def number(name: str) -> float | None:
        value = field(told, name, float, None)
        return None if value is None else float(value)

    try:
        return Sampling(
            max_tokens=_tokens(told),
            temperature=number("temperature"),
            top_p=number("top_p"),
            seed=field(told, "seed", int, None),
            top_k=_top_k(told),
            min_p=number("min_p"),
            repetition_penalty=number("repetition_penalty"),
            presence_penalty=number("presence_penalty"),
            frequency_penalty=number("frequency_penalty"),
            logit_bias=_bias(told),
            stop=_stops(told["stop"]) if "stop" in told else None,
            logprobs=_chat_logprobs(told) if chat else _logprobs(told),
        )
    except UsageError as e:
        raise Refusal(400, e.message, code=e.code) from e
    except OverflowError as e:
        raise Refusal(400, "A number is too large.", code="out-of-range") from e


def _tokens(told: Mapping[str, Any]) -> int | None:
    names = [n for n in ("max_tokens", "max_completion_tokens") if n in told]
    said = {field(told, n, int, None) for n in names}
    if len(said) > 1:
        raise Refusal(400, "max_tokens and max_completion_tokens differ: say one.", code="contradiction", param=names[1])
    number: int | None = said.pop() if said else None
    return number


def _top_k(told: Mapping[str, Any]) -> int | None:
    value: int | None = field(told, "top_k", int, None)
    return 0 if value == -1 else value  # as vLLM's clients say "all"


def _bias(told: Mapping[str, Any]) -> dict[int, float]:
    out = {}
    for token, value in field(told, "logit_bias", dict, {}).items():
        if not token.isascii() or not token.isdigit() or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refusal(
                400,
                "logit_bias gives each token, by its number, a number from -100 to 100.",
                code="wrong-type",
                param="logit_bias",
            )
        if int(token) in out:
            raise Refusal(400, f"logit_bias names token {int(token)} twice.", code="said-twice", param="logit_bias")
        out[int(token)] = float(value)
    return out


def _logprobs(told: Mapping[str, Any]) -> int | None:
    if told.get("logprobs") is False:
        return None
    count: int | None = field(told, "logprobs", int, None)
    if count is not None and not 0 <= count <= MOST_COMPLETION_LOGPROBS:
        raise Refusal(400, f"logprobs is 0 to {MOST_COMPLETION_LOGPROBS}, not {count}.", code="out-of-range", param="logprobs")
    return count


def _chat_logprobs(told: Mapping[str, Any]) -> int | None:
    count = field(told, "top_logprobs", int, 0)
    if not 0 <= count <= MOST_LOGPROBS:
        raise Refusal(400, f"top_logprobs is 0 to {MOST_LOGPROBS}, not {count}.", code="out-of-range", param="top_logprobs")
    if field(told, "logprobs", bool, False):
        return int(count)
    if count:
        raise Refusal(400, "top_logprobs needs logprobs to be true.", code="contradiction", param="top_logprobs")
    return None


def _texts(told: Mapping[str, Any]) -> int:
    n = field(told, "n", int, 1)
    if not 1 <= n <= MOST_TEXTS:
        raise Refusal(400, f"n is 1 to {MOST_TEXTS}, not {n}.", code="out-of-range", param="n")
    if field(told, "best_of", int, n) != n:
        raise Refusal(400, "best_of is not supported but as n.", code="unsupported", param="best_of")
    return int(n)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return tuple(value)
    raise Refusal(400, "prompt is one text or one list of token ids.", code="wrong-type", param="prompt")


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > 4 or not all(isinstance(v, str) and v for v in values):
        raise Refusal(400, "stop is a text or a list of up to four.", code="wrong-type", param="stop")
    return tuple(values)
