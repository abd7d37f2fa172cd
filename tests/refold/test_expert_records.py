"""Expert records: what is written is what is read, and nothing else passes for it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refold.errors import BundleError, UsageError
from refold.experts import BITS, ExpertIndex, Geometry, Record, decode, dequantise, encode, quantise, record_bytes


@given(st.sampled_from(BITS), st.sampled_from([32, 64, 128]), st.integers(1, 5), st.integers(1, 200), st.integers(0, 2**31 - 1))
def test_a_record_gives_back_its_matrices(bits, group, rows, columns, seed):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(rows, columns)).astype(np.float32), rng.normal(size=(columns, rows)).astype(np.float32)]
    matrices = [quantise(w, bits, group) for w in weights]
    record = encode(3, 7, matrices)
    shapes = [w.shape for w in weights]
    assert len(record) == record_bytes(shapes, bits, group) and len(record) % 4096 == 0
    for before, after in zip(matrices, decode(record, shapes, 3, 7), strict=True):
        assert np.array_equal(dequantise(before), dequantise(after))
        assert not after.codes.flags.owndata  # a view: the cache holds packed bytes only


@given(st.sampled_from(BITS), st.integers(0, 2**31 - 1))
def test_no_weight_is_further_from_its_code_than_half_a_step_unless_cut(bits, seed):
    weight = np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float32)
    matrix = quantise(weight, bits, 32)
    reach = {8: 127.0, 4: 7.0, 2: 1.5}[bits]
    step = np.repeat(matrix.scales.astype(np.float32), 32, axis=1)
    inside = np.abs(weight) <= reach * step
    assert (np.abs(dequantise(matrix) - weight)[inside] <= 0.501 * step[inside]).all()


def test_packing_is_planar_within_32_columns():
    weight = np.zeros((1, 32), np.float32)
    weight[0, 17], weight[0, 0] = 7.0, -8.0
    matrix = replace(quantise(weight, 4, 32))
    levels = (dequantise(matrix) / float(matrix.scales[0, 0]) + 8).astype(int)[0]
    assert matrix.codes[0, 1] == levels[1] | levels[17] << 4


def test_the_record_of_another_expert_is_refused():
    matrices = [quantise(np.ones((4, 32), np.float32), 4, 32), quantise(np.ones((32, 4), np.float32), 4, 32)]
    record = encode(1, 2, matrices)
    with pytest.raises(BundleError, match="expert 3 of layer 1"):
        decode(record, [(4, 32), (32, 4)], 1, 3)
    with pytest.raises(BundleError, match="truncated"):
        decode(record[:1024], [(4, 4096), (4096, 4)], 1, 2)
    with pytest.raises(BundleError, match="truncated"):
        decode(b"", [(4, 32), (32, 4)], 1, 2)


@pytest.mark.parametrize(("bits", "group", "weight"), [(3, 32, 1.0), (4, 31, 1.0), (4, 32, np.inf)])
def test_what_cannot_be_quantised_is_said(bits, group, weight):
    with pytest.raises(UsageError):
        quantise(np.full((2, 32), weight, np.float32), bits, group)


def _index():
    geometry = Geometry("mixtral", (0, 1), 2, 1, 32, 16, True, "silu", 32)
    records, at = {}, 0
    for layer in (0, 1):
        for expert in (0, 1):
            size = record_bytes(geometry.shapes, 4, 32)
            records[layer, expert] = Record(layer, expert, 4, at, size, hashlib.sha256(b"").hexdigest())
            at += size
    return ExpertIndex(geometry, records, {(0, 1): 0.25})


def test_an_index_survives_json():
    index = _index()
    again = ExpertIndex.from_json(index.to_json(), "m.refold")
    assert again == index and again.total == 4 * 4096 and again.largest == 4096


def test_damaged_indices_are_refused():
    index = _index()
    bad = {
        "overlap": replace(index, records=dict(index.records) | {(1, 1): replace(index[1, 1], offset=0)}),
        "missing": replace(index, records={k: v for k, v in index.records.items() if k != (1, 1)}),
        "bits": replace(index, records=dict(index.records) | {(1, 1): replace(index[1, 1], bits=3)}),
    }
    for what, broken in bad.items():
        with pytest.raises(BundleError, match="index"):
            ExpertIndex.from_json(broken.to_json(), what)
    for content in (b"", b"[]", b"{}", b'{"format": 9}', index.to_json()[:-5]):
        with pytest.raises(BundleError, match="index"):
            ExpertIndex.from_json(content, "x")
