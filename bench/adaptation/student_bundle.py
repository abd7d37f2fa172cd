"""The bundle the Refold rows run: ResNet-20 exported once by the product's own pipeline and kept beside the streams."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bench.corrupt.streams import cache_folder
from demo.images import cifar10, data_folder
from demo.models import load_npz, resnet20
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.bundle import Bundle
from refold.errors import InputError
from refold.preprocess import Preprocess

__all__ = ["student_bundle"]

PREPROCESS = Preprocess(32, 32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CALIBRATION = 2048
ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "export", ROOT / "refold" / "statistics")


def student_bundle() -> Bundle:
    """Calibrated on 2,048 labelled training pictures; exported anew when the exporter's sources change."""
    folder = data_folder()
    if folder is None:
        raise InputError("The Refold rows need the student's weights: set REFOLD_DATA to their folder.", code="no-data")
    path = cache_folder().parent / "bundles" / f"resnet20-{_fingerprint()}.refold"
    if path.is_file():
        return Bundle.open(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    images, labels = cifar10("train5k")
    chosen = np.random.default_rng(0).permutation(len(images))[:CALIBRATION]
    pictures = Pictures(images[chosen], labels[chosen].astype(np.int64))
    module = load_npz(resnet20(), folder / "resnet20_cifar10.npz").eval()
    return export_model(module, path, PREPROCESS, pictures, Options(name="resnet20")).bundle


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in (s for folder in SOURCES for s in sorted(folder.rglob("*.py"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
