"""llama2.c's `.bin` files as a Hugging Face Llama checkpoint: weights under other names, the vocabulary as a tokenizer.json.

Version 0 (github.com/karpathy/llama2.c, export.py, `legacy_export`): seven int32 (dim, hidden, layers, heads, key-value heads,
vocabulary, context; a vocabulary below zero says that the output does not share the embedding), then float32 arrays, each of
all layers. It rotates neighbouring pairs (2i, 2i + 1) of a head where transformers rotates (i, i + half): rows of the query and
key projections change places, and nothing else does.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refold.atomic import write_atomically
from refold.errors import InputError
from refold.experts import Resident, Tensor
from refold.experts.tensors import packed

__all__ = ["convert_llama2c", "is_llama2c", "tokenizer_json"]

HEADER = struct.Struct("<7i")
MAGIC = 0x616B3432  # of the later versions
F32 = NDArray[np.float32]


def is_llama2c(path: Path) -> bool:
    return path.is_file() and path.suffix == ".bin"


def convert_llama2c(path: Path, folder: Path, vocabulary: Path | None = None) -> None:
    """Writes config.json, model.safetensors and, where there is a vocabulary, the tokenizer's files into `folder`.

    Args:
        vocabulary: llama2.c's tokenizer file; None: `tok<size>.bin` or `tokenizer.bin` beside `path`, where there is one.

    Raises:
        InputError: another version, a size that does not match its header, numbers that are not finite, or no such vocabulary.
    """
    sizes, arrays = _read(path)
    dim, hidden, layers, heads, kv_heads, vocab, context = sizes
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": abs(vocab), "hidden_size": dim,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": context, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": vocab > 0,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    tensors = dict(_named(arrays, layers, heads, kv_heads))
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path} holds infinite numbers or NaN in {name}: it is damaged.", code="not-finite")
    write_atomically(folder / "config.json", [json.dumps(config, indent=1).encode()])
    found = vocabulary or _beside(path, abs(vocab))
    if found is not None:
        write_atomically(folder / "tokenizer.json", [json.dumps(tokenizer_json(found, abs(vocab))).encode()])
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write_atomically(folder / "tokenizer_config.json", [json.dumps(told).encode()])
    write_atomically(folder / "model.safetensors", packed([Resident.of(n, Tensor.of(array)) for n, array in tensors.items()]))


def _beside(path: Path, size: int) -> Path | None:
    tried = (path.with_name(f"tok{size}.bin"), path.with_name("tokenizer.bin"))
    return next((p for p in tried if p.is_file()), None)


def _read(path: Path) -> tuple[tuple[int, ...], dict[str, F32]]:
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}.", code="checkpoint") from e
    if len(content) < HEADER.size or struct.unpack_from("<I", content)[0] == MAGIC:
        raise InputError(f"{path} is no llama2.c file of version 0: export it with `--version 0`.", code="checkpoint")
    sizes = HEADER.unpack_from(content)
    dim, hidden, layers, heads, kv_heads, vocab, context = sizes
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), context) < 1 or dim % heads or heads % kv_heads:
        raise InputError(f"{path} has an impossible header {sizes}: it is no llama2.c file, or damaged.", code="checkpoint")
    head = dim // heads
    kv, half = head * kv_heads, head // 2
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (abs(vocab), dim), "attention_norm": (layers, dim), "wq": (layers, dim, dim), "wk": (layers, kv, dim),
        "wv": (layers, kv, dim), "wo": (layers, dim, dim), "ffn_norm": (layers, dim), "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden), "w3": (layers, hidden, dim), "norm": (dim,), "cosines": (context, half),
        "sines": (context, half),
    }  # fmt: skip
    if vocab < 0:
        shapes["output"] = (-vocab, dim)
    wanted = HEADER.size + 4 * sum(math.prod(s) for s in shapes.values())
    if len(content) != wanted:
        raise InputError(f"{path} has {len(content):,} bytes where its header asks for {wanted:,}.", code="checkpoint")
    arrays, at = {}, HEADER.size
    for name, shape in shapes.items():
        arrays[name] = np.frombuffer(content, "<f4", math.prod(shape), at).reshape(shape)
        at += 4 * math.prod(shape)
    return sizes, arrays


def _named(a: dict[str, F32], layers: int, heads: int, kv_heads: int) -> Iterator[tuple[str, F32]]:
    yield "model.embed_tokens.weight", a["embedding"]
    for i in range(layers):
        block = f"model.layers.{i}."
        yield block + "input_layernorm.weight", a["attention_norm"][i]
        yield block + "self_attn.q_proj.weight", _halves(a["wq"][i], heads)
        yield block + "self_attn.k_proj.weight", _halves(a["wk"][i], kv_heads)
        yield block + "self_attn.v_proj.weight", a["wv"][i]
        yield block + "self_attn.o_proj.weight", a["wo"][i]
        yield block + "post_attention_layernorm.weight", a["ffn_norm"][i]
        yield block + "mlp.gate_proj.weight", a["w1"][i]
        yield block + "mlp.up_proj.weight", a["w3"][i]
        yield block + "mlp.down_proj.weight", a["w2"][i]
    yield "model.norm.weight", a["norm"]
    if "output" in a:
        yield "lm_head.weight", a["output"]


def _halves(w: F32, heads: int) -> F32:
    """Rows of each head from pairs (0, 1), (2, 3), ... to first halves, then second halves."""
    rows, columns = w.shape
    return np.ascontiguousarray(w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns))


def _pieces(path: Path, size: int) -> list[tuple[float, str]]:
    """(score, piece) by id."""
    try:
        content, out, at = path.read_bytes(), [], 4
        for _ in range(size):
            score, length = struct.unpack_from("<fi", content, at)
            piece = content[at + 8 : at + 8 + length]
            if length < 0 or len(piece) != length:
                raise InputError(f"{path} is truncated: it has fewer than {size} pieces.", code="checkpoint")
            out.append((score, piece.decode()))
            at += 8 + length
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}.", code="checkpoint") from e
    except (struct.error, UnicodeDecodeError) as e:
        raise InputError(f"{path} is no llama2.c vocabulary of {size} pieces.", code="checkpoint") from e
    return out


def tokenizer_json(path: Path, size: int) -> dict[str, Any]:
    """The vocabulary as a `tokenizers` file: byte-pair merges in the order of their pieces' scores, bytes for the rest.

    llama2.c merges the neighbours that give the piece of the highest score; every split of a piece into two pieces therefore is
    a merge of that piece's rank. Raises InputError.
    """
    pieces = _pieces(path, size)
    names = ["<unk>", "<s>", "</s>", *(text for _, text in pieces[3:])]
    ids = {name: i for i, name in enumerate(names)}
    ranked = sorted(range(259, size), key=lambda i: (-pieces[i][0], i))
    merges = [
        [name[:cut], name[cut:]]
        for name in (names[i] for i in ranked)
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]
    special = [
        {
            "id": i,
            "content": names[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in range(3)
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Prepend", "prepend": " "}, "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": True, "ignore_merges": False, "vocab": ids, "merges": merges,
        },
    }  # fmt: skip
