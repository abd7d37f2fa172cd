"""The networks of the field streams: each as a bundle by the product's exporter, with unseen labelled images."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from bench.adaptation.rows import weights
from bench.corrupt.streams import cache_folder
from bench.field.forge_nets import forge_mobilenetv2, forge_resnet20
from bench.models import efficientnet_lite0
from demo.images import cifar10
from demo.models import load_npz, resnet20
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.bundle import Bundle
from refold.preprocess import Preprocess

__all__ = ["NETWORKS", "Network", "bundle_of", "images_of"]

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("export", "refold/statistics", "refold/norms.py")
CALIBRATION = 2048
FORGE: dict[str, object] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
IMAGENET: dict[str, object] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LITE: dict[str, object] = {"scale": 1 / 128, "mean": (127 / 128,) * 3, "std": (1.0,) * 3}
PHOTO_CALIBRATION = 100  # of the 300 photographs; the others are the stream


@dataclass(frozen=True)
class Network:
    """Attributes:
    make: the module with its trained weights.
    side: of its input.
    photographs: its images are the data folder's photographs, else CIFAR-10's test images.
    """

    name: str
    make: Callable[[], nn.Module]
    side: int
    preprocess: dict[str, object]
    photographs: bool = False


NETWORKS = {
    n.name: n
    for n in (
        Network("resnet20", lambda: load_npz(resnet20(), weights("resnet20_cifar10.npz")), 32, IMAGENET),
        Network("forge-resnet20", lambda: load_npz(forge_resnet20(), weights("forge_resnet20_cifar10.npz")), 32, FORGE),
        Network(
            "forge-mobilenetv2", lambda: load_npz(forge_mobilenetv2(), weights("forge_mobilenetv2_cifar10.npz")), 32, FORGE
        ),
        Network("efficientnet-lite0", efficientnet_lite0, 224, LITE, photographs=True),
    )
}


@cache
def images_of(name: str) -> tuple[U8, I64]:
    """Images the network has not seen, uint8 (N, side, side, 3), and labels int64 (N,)."""
    if NETWORKS[name].photographs:
        images, labels = _photographs()
        return images[PHOTO_CALIBRATION:], labels[PHOTO_CALIBRATION:]
    images, labels = cifar10("test")
    return images, labels.astype(np.int64)


def bundle_of(name: str) -> Bundle:
    """Exported once with default options and kept; anew when the exporter's sources change."""
    network = NETWORKS[name]
    path = cache_folder().parent / "bundles" / f"{name}-{_fingerprint()}.refold"
    if path.is_file():
        return Bundle.open(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if network.photographs:
        images, labels = _photographs()
        images, labels = images[:PHOTO_CALIBRATION], labels[:PHOTO_CALIBRATION]
    else:
        known, classes = cifar10("train5k")
        chosen = np.random.default_rng(0).permutation(len(known))[:CALIBRATION]
        images, labels = known[chosen], classes[chosen].astype(np.int64)
    preprocess = Preprocess(network.side, network.side, **network.preprocess)  # type: ignore[arg-type]
    options = Options(name=name, min_agreement=0.8)
    return export_model(network.make().eval(), path, preprocess, Pictures(images, labels), options).bundle


@cache
def _photographs() -> tuple[U8, I64]:
    """The 300 photographs as EfficientNet-Lite0 takes them: the inner 255 of 260 pixels, bicubic, 224x224."""
    with np.load(weights("photos300.npz")) as archive:
        jpeg, offset, labels = archive["jpeg"].tobytes(), archive["offset"], archive["label"].astype(np.int64)
    images = []
    for first, last in itertools.pairwise(offset):
        with Image.open(io.BytesIO(jpeg[int(first) : int(last)])) as image:
            shrunk = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=(2.5, 2.5, 257.5, 257.5))
            images.append(np.asarray(shrunk))
    order = np.random.default_rng(0).permutation(len(images))
    return np.stack(images)[order], labels[order]


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for part in SOURCES:
        path = ROOT / part
        for source in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
