"""Small real bundles and releases for the core's tests (no torch, no ONNX)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from strategies import XS, site

from refold import ActivationScale, Bundle, NormTable, Preprocess, Release, SigningKey, write_bundle
from refold.codec import table_to_pb
from refold.v1 import manifest_pb2 as pb

PARTS = {
    "targets/ort-x86-avx2/model.onnx": b"model" * 400,
    "targets/ort-x86-avx2/taps.onnx": b"taps",
    "student.pt2": bytes(5000),
}


def manifest(table: NormTable | None = None) -> pb.Manifest:
    table = table or NormTable((site(np.random.default_rng(0), 4),), (ActivationScale("input", XS, 0, "in.scale", "in.zp"),))
    m = pb.Manifest(
        name="tiny", made_by="tests", input_name="input", output_name="logits", class_count=3, student="student.pt2"
    )
    m.preprocess.CopyFrom(Preprocess(8, 8).to_pb())
    m.norms.CopyFrom(table_to_pb(table))
    target = m.targets.add(name="ort-x86-avx2", model="targets/ort-x86-avx2/model.onnx", weight_bits=7, updatable=True)
    target.checks["fused"] = 1
    m.layers.add(name="conv", op="Conv", weight_bits=7, weight_bytes=108, site="layer1.0.conv1", runs_in="int8")
    return m


def bundle(path: Path, *keys: SigningKey, **kwargs: object) -> Bundle:
    return write_bundle(path, manifest(), PARTS, *keys)


def release(b: Bundle, version: int = 1, **changes: object) -> Release:
    states = {s.name: s.exported for s in b.norms.norms}
    values: dict[str, object] = {"bundle_digest": b.digest, "cohort": "roof", "version": version, "states": states}
    return Release(**{**values, **changes})  # type: ignore[arg-type]
