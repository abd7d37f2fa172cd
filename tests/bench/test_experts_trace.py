"""The trace against OLMoE's public numbers, and the model whose routing it is."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.experts.checkpoint import Words, write_bundle, write_folder, write_gguf
from bench.experts.gguf import blocks
from bench.experts.shape import Shape
from bench.experts.trace import PUBLIC, belady, lru, overlap, routing, statistics
from bench.experts.verify import equality
from bench.experts.weights import GAIN, expert, resident, resident_names
from refold.experts import decode, dequantise
from refold.experts.paged import PagedModel

TINY = Shape("tiny", layers=2, experts=8, top_k=2, hidden=256, intermediate=32, heads=2, tokens=24)


def test_the_trace_has_the_public_statistics_of_olmoe():
    found = statistics(routing(4, 64, 8, 600))
    for name, published in PUBLIC.items():
        assert found[name] == pytest.approx(published, abs=0.025), name


def test_the_trace_is_its_seed_s():
    assert np.array_equal(routing(2, 16, 4, 20, seed=5), routing(2, 16, 4, 20, seed=5))
    assert not np.array_equal(routing(2, 16, 4, 20, seed=5), routing(2, 16, 4, 20, seed=6))


@given(st.integers(0, 1000), st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_belady_is_never_worse_than_lru(seed, slots):
    trace = routing(2, 12, 2, 40, seed=seed)
    assert lru(trace, slots) <= belady(trace, slots) <= 1


def test_hit_rates_by_hand():
    trace = np.array([[[0]], [[1]], [[2]], [[0]], [[1]]], np.int16)  # one layer, top 1
    assert lru(trace, 2) == 0
    assert belady(trace, 2) == 0.2  # 2 pushes 1 out, so 0 is there
    assert lru(trace, 3) == belady(trace, 3) == 0.4
    assert overlap(trace) == 0


def _norm(x):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5)


def test_routers_choose_the_trace_whatever_layers_write():
    """A numpy forward of routers alone: any contents, any scale of the residual stream, outputs of a real down matrix."""
    words = Words.of(TINY)
    tensors = {name: resident(TINY, words.trace, i).astype(np.float32) for i, (name, _) in enumerate(resident_names(TINY))}
    draw = np.random.default_rng(0)
    down = dequantise(expert(TINY, 1, 3, 4)[1])
    assert not down[: TINY.contents].any() and down[TINY.contents :].any()
    assert not tensors["model.layers.0.self_attn.o_proj.weight"][: TINY.contents].any()
    for word in range(TINY.tokens):
        stream = tensors["model.embed_tokens.weight"][word].copy()
        for layer in range(TINY.layers):
            stream += down @ draw.standard_normal(TINY.intermediate).astype(np.float32) * 20
            logits = tensors[f"model.layers.{layer}.mlp.gate.weight"] @ _norm(stream)
            assert np.argsort(-logits)[: TINY.top_k].tolist() == words.trace[word, layer].tolist()
        assert (tensors["lm_head.weight"] @ _norm(stream)).argmax() == (word + 1) % TINY.tokens
    assert tensors["model.layers.1.mlp.gate.weight"].max() == GAIN


def test_equality_sees_one_wrong_expert():
    words = Words.of(TINY)
    right = [[list(reversed(layer)) for layer in token] for token in words.trace[:4].tolist()]
    assert equality(right, words) == 1
    right[2][1][0] = next(e for e in range(TINY.experts) if e not in right[2][1])
    assert equality(right, words) == 1 - 1 / (4 * TINY.layers)


def _read_gguf(path):
    """name -> (shape as numpy has it, type, bytes), and the metadata; written from the format's description alone."""
    raw, at = path.read_bytes(), 0

    def take(form):
        nonlocal at
        out = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return out if len(out) > 1 else out[0]

    def text():
        nonlocal at
        n = take("Q")
        at += n
        return raw[at - n : at].decode()

    assert raw[:4] == b"GGUF"
    _, version, tensors, pairs = take("4sIQQ")
    assert version == 3
    metadata = {}
    for _ in range(pairs):
        key, kind = text(), take("I")
        metadata[key] = text() if kind == 8 else take({4: "I", 6: "f"}[kind])
    infos = []
    for _ in range(tensors):
        name, n = text(), take("I")
        dims = [take("Q") for _ in range(n)]
        infos.append((name, tuple(reversed(dims)), take("I"), take("Q")))
    start = -(-at // 32) * 32
    per = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}
    out = {}
    for name, shape, kind, offset in infos:
        size = int(np.prod(shape)) // per[kind][0] * per[kind][1]
        assert offset % 32 == 0
        out[name] = (shape, kind, raw[start + offset : start + offset + size])
        assert len(out[name][2]) == size
    return out, metadata


def _dequantised(shape, kind, data):
    if kind in (0, 1):
        return np.frombuffer(data, np.float32 if kind == 0 else np.float16).reshape(shape).astype(np.float32)
    raw = np.frombuffer(data, np.uint8).reshape(-1, 18 if kind == 2 else 34)
    scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
    codes = raw[:, 2:]
    levels = np.concatenate([codes & 15, codes >> 4], 1).astype(np.float32) - 8 if kind == 2 else codes.view(np.int8)
    return (scale * levels).reshape(shape)


@pytest.mark.parametrize("bits", [4, 8])
def test_gguf_holds_the_same_weights_as_the_bundle(tmp_path, bits):
    words = Words.of(TINY)
    write_gguf(tmp_path / "m.gguf", words, bits)
    write_bundle(tmp_path / "m.refold", words, bits)
    found, metadata = _read_gguf(tmp_path / "m.gguf")
    assert metadata["general.architecture"] == "olmoe" and metadata["olmoe.expert_used_count"] == TINY.top_k
    assert metadata["olmoe.vocab_size"] == TINY.tokens and metadata["tokenizer.ggml.model"] == "no_vocab"
    model = PagedModel.open(tmp_path / "m.refold")
    model.bundle.verify()
    ours = {name: tensor.numpy() for name, tensor in model.resident_tensors()}
    assert np.array_equal(_dequantised(*found["token_embd.weight"]), ours["model.embed_tokens.weight"])
    assert np.array_equal(_dequantised(*found["blk.1.attn_output.weight"]), ours["model.layers.1.self_attn.o_proj.weight"])
    assert found["blk.0.attn_norm.weight"][1] == 0, "llama.cpp wants norms in float32"
    i = TINY.intermediate
    for layer, number in ((0, 0), (1, 7)):
        both = decode(model.read_record(layer, number), TINY.geometry.shapes, layer, number)
        gate_up, down = (dequantise(m) for m in both)
        for name, wanted in (("gate", gate_up[:i]), ("up", gate_up[i:]), ("down", down)):
            assert np.array_equal(_dequantised(*found[f"blk.{layer}.ffn_{name}_exps.weight"])[number], wanted)
    assert len(found) == len(resident_names(TINY)) + 3 * TINY.layers


def test_blocks_are_cut_by_rows():
    gate_up, _ = expert(TINY, 0, 1, 4)
    whole = blocks(gate_up)
    assert np.array_equal(np.concatenate([blocks(gate_up, slice(0, 32)), blocks(gate_up, slice(32, 64))]), whole)


def test_the_safetensors_folder_is_transformers_own_form(tmp_path):
    from safetensors.numpy import load_file

    words = Words.of(TINY)
    write_folder(tmp_path, words, 4)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert len(raw) > 8
    import ml_dtypes  # noqa: F401  what safetensors reads bfloat16 with

    found = load_file(tmp_path / "model.safetensors")
    wanted = dequantise(expert(TINY, 1, 2, 4)[1])
    got = np.asarray(found["model.layers.1.mlp.experts.2.down_proj.weight"], np.float32)
    assert np.allclose(got, wanted, rtol=2**-8, atol=0)


def test_words_and_calibration_are_of_one_text():
    words = Words.of(TINY)
    assert words.trace.shape == (TINY.tokens, TINY.layers, TINY.top_k)
    for layer in range(TINY.layers):
        assert sum(f for (at, _), f in words.frequency.items() if at == layer) == pytest.approx(TINY.top_k)
