"""Between text and tokens: the bundle's own tokenizer, or bytes; text grows with the tokens, never by half a character."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from edge.experts.decode.pieces import Pieces
from edge.experts.decode.plan import NOTHING, Defaults, ids_of
from edge.experts.decode.text import Text
from refold.errors import BundleError, InputError
from refold.experts import PagedModel

__all__ = ["Bytes", "Codec", "Growing", "HuggingFace", "Text", "codec"]

BYTES = 256


class Growing(Protocol):
    """Text so far: call `add` per token, `end` once; each gives what is new."""

    def add(self, token: int) -> str: ...
    def end(self) -> str: ...


class Codec(Protocol):
    """Attributes: `stops` end a text. `encode` and `chat` raise InputError for what is no text.

    `growing(prompt)` is the text behind those tokens. `piece(token)` is one token as bytes, whatever stands beside it.
    """

    stops: frozenset[int]

    def encode(self, text: str) -> list[int]: ...
    def growing(self, prompt: Sequence[int] = ()) -> Growing: ...
    def piece(self, token: int) -> bytes: ...
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...


def codec(paged: PagedModel, defaults: Defaults = NOTHING) -> Codec:
    """The tokenizer a bundle holds, or bytes.

    Args:
        defaults: what the bundle says of its texts; where that names no token that ends one, the configuration's and the
            tokenizer's do.

    Raises:
        BundleError: the files make no tokenizer, or there are none and its tokens are not bytes.
    """
    files = paged.tokenizer_files()
    if files:
        return HuggingFace(files, paged.config, str(paged.path), defaults.stop_tokens)
    if not paged.bytes_as_tokens:
        raise BundleError(
            f"{paged.path} has no tokenizer, and its tokens are not bytes: export it with its tokenizer files.",
            code="no-tokenizer",
        )
    return Bytes(defaults.stop_tokens or ids_of(paged.config.get("eos_token_id")))


def checked(text: str) -> str:
    """Raises InputError: half a character, as broken JSON escapes and undecodable arguments leave it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("The text holds half a character (a lone surrogate): send it as UTF-8.", code="text") from None
    return text


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """What a model without a chat template is given: a line per message, and the beginning of the answer's."""
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"


class Bytes:
    """A token is a byte of UTF-8; ids from 256 on are special and have no text."""

    def __init__(self, stops: frozenset[int]) -> None:
        self.stops = stops

    def encode(self, text: str) -> list[int]:
        return list(checked(text).encode())

    def growing(self, prompt: Sequence[int] = ()) -> Growing:
        return Text(self._decode, prompt)

    def _decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode(errors="replace")

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < BYTES else b""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode(plain_chat(messages))


class HuggingFace:
    """transformers' tokenizer, from the bundle's files alone: nothing is downloaded and no code of the bundle runs."""

    def __init__(
        self, files: Mapping[str, bytes], config: Mapping[str, Any], path: str, stops: frozenset[int] = frozenset()
    ) -> None:
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory(prefix="refold-tokenizer-") as folder:
            told = {k: v for k, v in config.items() if k != "auto_map"}
            (Path(folder) / "config.json").write_text(json.dumps(told))
            for name, content in files.items():
                (Path(folder) / PurePosixPath(name).name).write_bytes(content)
            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as e:
                raise BundleError(f"The tokenizer in {path} cannot be used: {e}.", code="damaged", detail=repr(e)) from e
        self.stops = stops or ids_of(config.get("eos_token_id")) | ids_of(self._tokenizer.eos_token_id)
        self._pieces = Pieces(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer(checked(text))["input_ids"]]

    def growing(self, prompt: Sequence[int] = ()) -> Growing:
        return Text(self._decode, prompt, self._pieces.bytes_of)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Raises InputError: the model's chat template refuses the messages."""
        plain = checked(plain_chat(messages))
        if not getattr(self._tokenizer, "chat_template", None):
            return self.encode(plain)
        try:
            ids = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        except Exception as e:
            raise InputError(f"The model's chat template does not take these messages: {e}", code="messages") from e
        return [int(i) for i in ids]
