"""A real bundle of one small integer layer, and releases for it: enough for everything that never runs the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from refold import ActivationScale, Bundle, NormSite, NormState, NormTable, Preprocess, Release, write_bundle
from refold.codec import table_to_pb
from refold.v1 import manifest_pb2 as pb

COHORT = "roof"
CHANNELS = 300  # a release of about 5 KB: larger than a page of SQLite's


def table() -> NormTable:
    rng = np.random.default_rng(0)
    exported = NormState(rng.uniform(0.5, 2, CHANNELS), rng.normal(0, 1, CHANNELS), np.zeros(CHANNELS), np.ones(CHANNELS))
    site = NormSite.folded(
        "conv", weight_scale=np.full(CHANNELS, 0.01), layer_bias=np.zeros(CHANNELS), exported=exported, input_tensor="input",
        input_scale=0.03,
    )  # fmt: skip
    return NormTable((site,), (ActivationScale("input", 0.03, 0, "in.scale", "in.zp"),))


def bundle(path: Path, name: str = "tiny") -> Bundle:
    manifest = pb.Manifest(name=name, input_name="input", output_name="logits", class_count=3)
    manifest.preprocess.CopyFrom(Preprocess(8, 8).to_pb())
    manifest.norms.CopyFrom(table_to_pb(table()))
    manifest.targets.add(name="ort", model="model.onnx", updatable=True)
    return write_bundle(path, manifest, {"model.onnx": b"model"})


def release(b: Bundle, version: int, **changes: object) -> Release:
    site = b.norms.norms[0]
    state = site.exported.with_statistics(site.exported.mean + np.float32(0.01 * version), site.exported.variance)
    values = {"bundle_digest": b.digest, "cohort": COHORT, "version": version, "states": {site.name: state}, **changes}
    return Release(**values)  # type: ignore[arg-type]
