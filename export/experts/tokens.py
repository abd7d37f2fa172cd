"""Calibration text as windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.experts.checkpoint import Checkpoint
from refold.errors import InputError, ModelError

__all__ = ["Windows", "bytes_as_tokens", "windows_of"]

BYTES = 256


@dataclass(frozen=True)
class Windows:
    """ids: int64 (windows, length + 1): each token but the first of a window is predicted. digest: of the ids."""

    ids: NDArray[np.int64]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.ids.shape).encode() + self.ids.tobytes()).hexdigest()

    @property
    def predicted(self) -> int:
        return int(self.ids.shape[0] * (self.ids.shape[1] - 1))


def bytes_as_tokens(checkpoint: Checkpoint) -> bool:
    """True where there is no tokenizer and the vocabulary is the 256 bytes."""
    return not checkpoint.tokenizer_files() and checkpoint.config.get("vocab_size") == BYTES


def windows_of(checkpoint: Checkpoint, texts: Sequence[Path], length: int, count: int) -> Windows:
    """Up to `count` windows, evenly over all texts.

    Raises:
        InputError: no UTF-8, or shorter than one window. ModelError: no tokenizer, and tokens are not bytes.
    """
    streams = [_encode(checkpoint, path) for path in texts]
    starts = [(ids, at) for ids in streams for at in range(0, len(ids) - length, length)]
    if not starts:
        names = ", ".join(map(str, texts))
        raise InputError(f"{names} holds fewer than {length + 1} tokens: give a longer text.", code="text")
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(count, len(starts))).round().astype(int))
    return Windows(np.stack([starts[i][0][starts[i][1] : starts[i][1] + length + 1] for i in chosen]))


def _encode(checkpoint: Checkpoint, path: Path) -> NDArray[np.int64]:
    try:
        text = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}.", code="text") from e
    if bytes_as_tokens(checkpoint):
        return np.frombuffer(text, np.uint8).astype(np.int64)
    if not checkpoint.tokenizer_files():
        raise ModelError(
            f"{checkpoint.folder} has no tokenizer and its {checkpoint.config.get('vocab_size')} tokens are not bytes, so no "
            "text can be measured: put tokenizer.json beside config.json.",
            code="no-tokenizer",
        )
    try:
        words = text.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is no UTF-8 text.", code="text") from e
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.folder), local_files_only=True, trust_remote_code=False)
        return np.asarray(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
    except Exception as e:  # transformers and tokenizers raise many kinds
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"The tokenizer of {checkpoint.folder} cannot be used: {first}", code="checkpoint") from e
