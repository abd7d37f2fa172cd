"""The nets that are measured: each as a torch module, as a bundle exported from it, and with real pictures to look at."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.adaptation.rows import weights
from bench.families import densenet121, vit_s
from bench.models import efficientnet_lite0, mobilenetv2, resnet50
from demo.images import cifar10
from demo.models import load_npz, resnet8, resnet20
from export.pictures import Pictures
from export.pipeline import Exported, Options, export_model
from refold.bundle import Bundle
from refold.preprocess import Preprocess

__all__ = ["MORE_NETS", "NETS", "Subject", "crops", "subject"]

U8 = NDArray[np.uint8]
IMAGENET: dict[str, object] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LITE: dict[str, object] = {"scale": 1 / 128, "mean": (127 / 128,) * 3, "std": (1.0,) * 3}  # EfficientNet-Lite's own
PIXELS: dict[str, object] = {"scale": 1.0}


@dataclass(frozen=True)
class Net:
    """How one net is made. `weights`: "trained" or "random"; random ones say nothing of accuracy, all of shape and time."""

    make: Callable[[], nn.Module]
    side: int
    preprocess: dict[str, object]
    weights: str
    calibration: int
    correct_bias: bool = False


NETS = {
    "resnet8": Net(lambda: load_npz(resnet8(), weights("resnet8_mlperftiny_cifar10.npz")), 32, PIXELS, "trained", 256),
    "resnet20": Net(lambda: load_npz(resnet20(), weights("resnet20_cifar10.npz")), 32, IMAGENET, "trained", 256),
    "mobilenetv2": Net(mobilenetv2, 224, IMAGENET, "random", 64),
    "resnet50": Net(resnet50, 224, IMAGENET, "random", 16),
}
# With weights of a package that only `bench.targets` asks for.
MORE_NETS = NETS | {
    "efficientnet-lite0": Net(efficientnet_lite0, 224, LITE, "trained", 64, correct_bias=True),
    "densenet121": Net(densenet121, 224, IMAGENET, "random", 16),
    "vit-s": Net(vit_s, 224, IMAGENET, "random", 16),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """One net, exported. `seconds`: from the module in memory to the bundle on disk, every check passed."""

    name: str
    net: Net
    module: nn.Module
    exported: Exported
    seconds: float = 0.0

    @property
    def bundle(self) -> Bundle:
        return self.exported.bundle

    @property
    def path(self) -> Path:
        return self.bundle.path

    @cached_property
    def float_onnx(self) -> bytes:
        """The same net in fp32 as torch writes it; ONNX Runtime folds its norms into the convolutions when it loads it."""
        content = io.BytesIO()
        x = torch.zeros(1, 3, self.net.side, self.net.side)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's deprecation notes: the other one needs a package of its own
            torch.onnx.export(
                self.module,
                (x,),
                content,  # type: ignore[arg-type]  # buffers are taken, whatever the hints say
                dynamo=False,
                opset_version=17,
                input_names=["input"],
                output_names=["logits"],
            )
        return content.getvalue()

    def frames(self, count: int, seed: int = 0) -> U8:
        """Pictures the net was not calibrated on."""
        return _pictures(self.net.side, count, seed, "test")


def subject(
    name: str,
    folder: Path,
    progress: Callable[[str], None] = lambda what: None,
    targets: Sequence[str] = ("ort-x86-avx2",),
    threads: int = 1,
) -> Subject:
    """Exports a net of `MORE_NETS` into `folder` with the product's own pipeline and checks.

    Args:
        threads: of torch while exporting, as `--threads`; one afterwards.
    """
    torch.set_num_threads(1)
    net = MORE_NETS[name]
    module = net.make().eval()
    preprocess = Preprocess(net.side, net.side, **net.preprocess)  # type: ignore[arg-type]
    pictures = Pictures(_pictures(net.side, net.calibration, 0, "train5k"), None)
    # A net that was never trained is undecided between its classes: there, agreement of the argmax means nothing.
    least = 0.9 if net.weights == "trained" else 0.0
    options = Options(targets, name, min_agreement=least, correct_bias=net.correct_bias)
    torch.set_num_threads(threads)
    started = time.perf_counter()
    exported = export_model(module, folder / f"{name}.refold", preprocess, pictures, options, progress=progress)
    seconds = time.perf_counter() - started
    torch.set_num_threads(1)
    return Subject(name, net, module, exported, seconds)


def _pictures(side: int, count: int, seed: int, split: str) -> U8:
    if side == 32:
        images, _ = cifar10(split)
        return images[np.random.default_rng(seed).permutation(len(images))[:count]]
    return crops(side, count, seed + (0 if split == "train5k" else 10_000))


def crops(side: int, count: int, seed: int) -> U8:
    """Random crops, half of them mirrored, of the photographs that scikit-image carries: uint8 (N, side, side, 3)."""
    from skimage import data

    photographs = [np.asarray(p()) for p in (data.astronaut, data.coffee, data.cat, data.rocket)]
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        top, left = (int(rng.integers(0, size - side + 1)) for size in photograph.shape[:2])
        crop = photograph[top : top + side, left : left + side]
        out.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.ascontiguousarray(np.stack(out))
