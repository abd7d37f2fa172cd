"""Weights of a routing-controlled model, made as they are written: nothing larger than one matrix is ever in memory.

The top k of every router is the trace's, in every engine: a router reads only its own dimensions of the residual stream, and
the rows of attention outputs and expert outputs that would write those (or the token's name) are zero. RMS norms scale but keep
the order.

Expert weights are one random block of codes, turned by another amount for each expert: random enough to be computed with, fast
enough to write gigabytes of. Every byte of every record has to be read when its expert is used.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bench.experts.shape import GROUP, Shape
from bench.experts.trace import Routing
from refold.experts import Matrix

__all__ = ["GAIN", "expert", "resident", "resident_names"]

F16 = NDArray[np.float16]
GAIN = 4.0  # of the router: the chosen experts' logits are about 5 to 10, the others' 0
SPREAD = 0.02  # standard deviation of the random weights
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def resident_names(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor that is not an expert's, by transformers' names, with its shape; in the order of `resident`."""
    h = shape.hidden
    names: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (shape.tokens, h))]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        names += [(f"{at}.{n}.weight", (h,)) for n in ("input_layernorm", "post_attention_layernorm")]
        names += [(f"{at}.self_attn.{n}.weight", (h,)) for n in ("q_norm", "k_norm")]
        names += [(f"{at}.self_attn.{n}.weight", (h, h)) for n in ATTENTION]
        names.append((f"{at}.mlp.gate.weight", (shape.experts, h)))
    return [*names, ("model.norm.weight", (h,)), ("lm_head.weight", (shape.tokens, h))]


def resident(shape: Shape, trace: Routing, number: int, seed: int = 0) -> F16:
    """The tensor of that number in `resident_names`. `trace`: int16 (tokens, layers, top k), a row for each word."""
    name, size = resident_names(shape)[number]
    name_of = np.random.default_rng((seed, 1)).choice(np.array([-1, 1], np.float16), (shape.tokens, shape.hidden // 16))
    draw = np.random.default_rng((seed, 2, number))
    if len(size) == 1:
        return np.ones(size, np.float16)
    if name.startswith("model.embed"):
        return _embedding(shape, trace, name_of, draw)
    if name.endswith(("lm_head.weight", "mlp.gate.weight")):
        out = np.zeros(size, np.float16)
        if name.startswith("lm_head"):
            out[:, shape.routed : shape.contents] = np.roll(name_of, 1, axis=0)  # what follows word v is word v + 1
        else:
            first = int(name.split(".")[2]) * shape.experts
            out[np.arange(shape.experts), first + np.arange(shape.experts)] = GAIN
        return out
    out = (SPREAD * draw.standard_normal(size, np.float32)).astype(np.float16)
    if name.endswith("o_proj.weight"):
        out[: shape.contents] = 0
    return out


def _embedding(shape: Shape, trace: Routing, name_of: F16, draw: np.random.Generator) -> F16:
    out = draw.standard_normal((shape.tokens, shape.hidden), np.float32).astype(np.float16)
    out[:, : shape.routed] = 0
    out[:, shape.routed : shape.contents] = name_of
    height = (1 + (shape.top_k - np.arange(shape.top_k)) / shape.top_k).astype(np.float16)
    rows = np.arange(shape.tokens)[:, None]
    for layer in range(shape.layers):
        out[rows, layer * shape.experts + trace[:, layer].astype(np.int64)] = height
    return out


@lru_cache(maxsize=4)
def _block(rows: int, columns: int, bits: int, seed: int) -> tuple[F16, NDArray[np.uint8]]:
    """Scales (rows, columns / 32) and codes (rows, columns x bits / 8) with weights of the standard deviation SPREAD."""
    draw = np.random.default_rng((seed, 3, rows, columns, bits))
    codes = draw.integers(0, 256, (rows, columns * bits // 8), np.uint8)
    if bits == 8:
        codes[codes == 128] = 129  # -128: some kernels cannot negate it
    level = {8: 73.3, 4: 4.61, 2: 1.12}[bits]
    scales = SPREAD / level * draw.uniform(0.8, 1.2, (rows, columns // GROUP))
    return scales.astype(np.float16), codes


def expert(shape: Shape, layer: int, number: int, bits: int, seed: int = 0) -> tuple[Matrix, Matrix]:
    """Gate and up rows in one matrix (2 intermediate, hidden), and down (hidden, intermediate)."""
    turn = 7 * (layer * shape.experts + number)
    out = []
    for size in shape.geometry.shapes:
        scales, codes = _block(*size, bits, seed)
        by = turn % size[0]
        out.append(Matrix(size, bits, GROUP, np.roll(scales, by, axis=0), np.roll(codes, by, axis=0)))
    out[1].scales[: shape.contents] = 0
    return out[0], out[1]
