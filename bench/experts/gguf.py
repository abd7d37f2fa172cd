"""The GGUF file of a routing-controlled model, for llama.cpp: the same codes and scales as our records, laid out its way.

Q4_0 is blocks of 32 weights, a float16 scale and 16 bytes whose low halves are the first 16 codes, plus 8; Q8_0 is a float16
scale and 32 int8 codes. Our records with groups of 32 say exactly that, so the weights of both files are equal, not alike.

Format: github.com/ggml-org/ggml docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.experts.shape import GROUP, Shape
from bench.experts.trace import Routing
from bench.experts.weights import expert, resident, resident_names
from refold.experts import Matrix

__all__ = ["Entry", "blocks", "write", "write_model"]

ALIGNMENT = 32
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
OUTER = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape as numpy has it, GGUF's number of its type, and its length in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    size: int


def blocks(matrix: Matrix, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """uint8 (rows, blocks, 18 or 34): Q4_0 of 4-bit, Q8_0 of 8-bit codes."""
    scales, codes = matrix.scales[rows], matrix.codes[rows]
    assert matrix.group == GROUP and matrix.bits in (4, 8), "llama.cpp has scales for 32 weights of 4 or 8 bits"
    out = np.empty((*scales.shape, 2 + GROUP * matrix.bits // 8), np.uint8)
    out[..., :2] = np.ascontiguousarray(scales)[..., None].view(np.uint8)
    out[..., 2:] = codes.reshape(*scales.shape, -1)
    return out


def write(path: Path, metadata: dict[str, object], entries: Sequence[Entry], data: Iterator[bytes]) -> None:
    """`data` gives the bytes of all tensors in the order of `entries`; a tensor may come in pieces."""
    with path.open("wb") as f:
        f.write(struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(metadata)))
        for key, value in metadata.items():
            f.write(_text(key) + _value(value))
        at = 0
        for e in entries:
            dims = tuple(reversed(e.shape))
            f.write(_text(e.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, e.kind, at))
            at += _up(e.size)
        f.write(bytes(_up(f.tell()) - f.tell()))
        for e in entries:
            left = e.size
            while left:
                piece = next(data)
                f.write(piece)
                left -= len(piece)
            f.write(bytes(_up(e.size) - e.size))


def write_model(path: Path, shape: Shape, trace: Routing, bits: int, told: Callable[[int], None] = lambda n: None) -> None:
    """The whole model. `told` hears of every piece's bytes."""
    entries = [_resident_entry(shape, name, size) for name, size in resident_names(shape)]
    kind, per = {4: (Q4_0, 18), 8: (Q8_0, 34)}[bits]
    i, h, n = shape.intermediate, shape.hidden, shape.experts
    parts = (("ffn_gate_exps", (n, i, h)), ("ffn_up_exps", (n, i, h)), ("ffn_down_exps", (n, h, i)))
    for layer in range(shape.layers):
        for name, size in parts:
            entries.append(Entry(f"blk.{layer}.{name}.weight", size, kind, int(np.prod(size)) // GROUP * per))

    def pieces() -> Iterator[bytes]:
        for number in range(len(resident_names(shape))):
            kind = np.float32 if entries[number].kind == F32 else np.float16
            yield resident(shape, trace, number).astype(kind).tobytes()
        for layer in range(shape.layers):
            for part, rows in ((0, slice(0, i)), (0, slice(i, 2 * i)), (1, slice(None))):
                for number in range(n):
                    piece = blocks(expert(shape, layer, number, bits)[part], rows).tobytes()
                    told(len(piece))
                    yield piece

    write(path, _metadata(shape), entries, pieces())


def _resident_entry(shape: Shape, name: str, size: tuple[int, ...]) -> Entry:
    if name in OUTER:
        new = f"{OUTER[name]}.weight"
    else:
        _, _, layer, rest = name.split(".", 3)
        new = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    kind = F32 if len(size) == 1 or "ffn_gate_inp" in new else F16
    return Entry(new, size, kind, int(np.prod(size)) * (4 if kind == F32 else 2))


def _metadata(shape: Shape) -> dict[str, object]:
    told: dict[str, object] = {
        "vocab_size": shape.tokens, "context_length": 4096, "embedding_length": shape.hidden, "block_count": shape.layers,
        "feed_forward_length": shape.intermediate, "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0,
        "expert_count": shape.experts, "expert_used_count": shape.top_k,
    }  # fmt: skip
    head: dict[str, object] = {"general.architecture": "olmoe", "general.alignment": ALIGNMENT}
    return head | {f"olmoe.{k}": v for k, v in told.items()} | {"tokenizer.ggml.model": "no_vocab"}


def _text(words: str) -> bytes:
    raw = words.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: object) -> bytes:
    """GGUF's uint32 (4), float32 (6) or string (8)."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
