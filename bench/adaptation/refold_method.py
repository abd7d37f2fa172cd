"""The Refold rows: the real engine, adapter, selector and distiller of the product, in one process and frame by frame.

    overlay     the device alone
    distilled   and uploads within a budget, the distiller, releases
    labels      the same uploads with their true labels instead of the teachers' votes: the bound of any teacher

What the network does is modelled by one number: a release reaches the device `delay` frames after the upload that set off its
training. Uploads are counted as the device would encode them, releases as they would be signed.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.adaptation.method import Log
from bench.adaptation.student_bundle import student_bundle
from cloud.distil import Candidate, Distiller, DistilSettings, Teachers, load_teachers
from demo.images import data_folder
from edge.adapt import Adapter, AdaptSettings, FrameFeatures, ImageObserver, Reference
from edge.encode import encode_image
from edge.engine import EngineFactory
from edge.select import BudgetSelector, make_selector
from edge.serving import ServingState
from edge.statistics import measure_of
from refold.bundle import Bundle
from refold.errors import InputError
from refold.norms import NormState
from refold.release import Release, encode
from refold.statistics import StatisticsModel

__all__ = ["RefoldMethod", "Tuning", "make_method"]

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
HEADER_BYTES = 250  # a SampleHeader: three digests in hex and a dozen numbers
SIGNATURE_BYTES = 82
TEACHERS = (("resnet56_augmix_cifar10", "resnet56"), ("resnet44_cifar10", "resnet44"))


@dataclass(frozen=True)
class Tuning:
    """Settings of the rows.

    Attributes:
        rate: uploads per frame in a domain that is known.
        eager_rate: the same until `eager` samples of a new domain went up: its first release waits for them.
        unbiased: share of the uploads that is chosen at random.
        delay: frames between the upload that sets off a training and its release.
    """

    rate: float = 0.05
    eager_rate: float = 0.6
    eager: int = 200
    unbiased: float = 0.9
    delay: int = 100
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    distil: DistilSettings = field(default_factory=lambda: DistilSettings(steps=120, fresh_samples=100, growth=2.0))


class TrueLabels(Teachers):
    """A teacher that is always right: it knows the label of every picture it will be shown."""

    def __init__(self, teachers: Teachers, classes: int) -> None:
        super().__init__(teachers.teachers, teachers.preprocess, teachers.settings)
        self._classes = classes
        self._labels: dict[bytes, int] = {}

    def learn(self, images: U8, labels: I64) -> None:
        self._labels.update({_digest(i): int(k) for i, k in zip(images, labels, strict=True)})

    def adapt(self, domain: str, images: U8) -> None:
        """Nothing to adapt."""

    def probabilities(self, images: U8, domain: str = "") -> NDArray[np.float32]:
        return np.eye(self._classes, dtype=np.float32)[[self._labels[_digest(i)] for i in images]]


def adapter_and_observer(
    factory: EngineFactory, settings: AdaptSettings, reference: Reference
) -> tuple[Adapter, ImageObserver]:
    """A device's adapter and what feeds it, as the daemon makes them."""
    bundle = factory.bundle
    model = StatisticsModel.of(bundle, settings.mix)
    classes = int(bundle.manifest.class_count)
    adapter = Adapter(model, settings, classes, reference=reference, bundle_digest=bundle.digest)
    measure = measure_of(factory, model, settings.memory_mb)
    assert measure is not None
    return adapter, ImageObserver(adapter, measure, model)


def _digest(image: U8) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


class RefoldMethod:
    """One device and its cloud. Calls of `run` follow each other without a reset.

    Args:
        bundle: the student.
        reference: features of its calibration slice.
        teachers: none: the device stays alone.
        tuning: numbers.
        seed: of the selector and the distiller.
        factory: builds engines; for studies with another arithmetic.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: Reference,
        teachers: Teachers | None,
        tuning: Tuning,
        *,
        seed: int = 0,
        factory: EngineFactory | None = None,
    ) -> None:
        self._bundle, self._tuning, self._teachers = bundle, tuning, teachers
        self._factory = factory or EngineFactory(bundle)
        classes = int(bundle.manifest.class_count)
        self.adapter, self._observer = adapter_and_observer(self._factory, tuning.adapt, reference)
        self._selector = make_selector(
            "budget", classes, {"rate": tuning.rate, "unbiased": tuning.unbiased, "burst": 4, "seed": seed}
        )
        self._distiller = Distiller(bundle, teachers, tuning.distil.model_copy(update={"seed": seed})) if teachers else None
        self._serve(ServingState(domain="d0"))
        self._frame = 0
        self._version = 0
        self._uploaded: dict[str, int] = {}
        self._released: set[str] = set()
        self._learnt: dict[str, Mapping[str, NormState]] = {}
        self._due: list[tuple[int, Candidate]] = []
        self.events: list[str] = []

    def _serve(self, serving: ServingState) -> None:
        self.serving = serving
        self._engine = self._factory.build(serving)

    def run(self, images: U8, labels: I64) -> tuple[I64, Log]:
        counts = {"frames_uploaded": 0.0, "bytes_up": 0.0, "bytes_down": 0.0, "releases": 0.0, "kept": 0.0, "builds": 0.0}
        if isinstance(self._teachers, TrueLabels):
            self._teachers.learn(images, labels)
        predictions = np.empty(len(images), np.int64)
        for i, image in enumerate(images):
            self._arrivals(counts)
            x = self._bundle.preprocess.apply(image)
            logits = self._engine.run(x)[0].astype(np.float64)
            probabilities = np.exp(logits - logits.max())
            probabilities /= probabilities.sum()
            predictions[i] = logits.argmax()
            if self.adapter.wants_image(FrameFeatures.of(image, probabilities)):
                self._observe(image, counts)
            if self._distiller is not None:
                self._upload(image, probabilities.astype(np.float32), counts)
            self._frame += 1
        return predictions, counts

    def _observe(self, image: U8, counts: dict[str, float]) -> None:
        counts["kept"] += 1
        serving = self._observer.observe(self._frame, image, self.serving)
        if serving is not None:
            if serving.domain != self.serving.domain:
                self.events.append(f"{self._frame}: {self.serving.domain} -> {serving.domain}")
            counts["builds"] += 1
            self._serve(serving)
        while (report := self.adapter.take_statistics()) is not None:
            if self._distiller is not None:
                counts["bytes_up"] += report.ByteSize()
                self._distiller.add_statistics(report)

    def _upload(self, image: U8, probabilities: NDArray[np.float32], counts: dict[str, float]) -> None:
        assert self._distiller is not None
        domain = self.adapter.domain
        if domain == "d0":
            return
        sent = self._uploaded.get(domain, 0)
        if isinstance(self._selector, BudgetSelector):
            self._selector.set_rate(self._tuning.eager_rate if sent < self._tuning.eager else self._tuning.rate)
        verdict = self._selector.judge(probabilities)
        if not verdict.keep:
            return
        self._uploaded[domain] = sent + 1
        counts["frames_uploaded"] += 1
        counts["bytes_up"] += len(encode_image(image)[1]) + HEADER_BYTES
        self._distiller.add_samples(image[None], domain, np.array([verdict.unbiased]))
        for ready in self._distiller.ready():
            candidate = self._distiller.train(ready, self._learnt.get(ready))
            self._learnt[ready] = candidate.states
            self._due.append((self._frame + self._tuning.delay, candidate))

    def _arrivals(self, counts: dict[str, float]) -> None:
        while self._due and self._due[0][0] <= self._frame:
            _, candidate = self._due.pop(0)
            unchanged = not candidate.metrics.get("share", 1.0) and candidate.metrics.get("mix") == self._tuning.distil.mix
            if unchanged and candidate.domain not in self._released:
                self.events.append(f"{self._frame}: nothing learnt for {candidate.domain}, {_told(candidate)}")
                continue
            self._version += 1
            release = Release(
                bundle_digest=self._bundle.digest,
                cohort="bench",
                version=self._version,
                states=candidate.states,
                domain=candidate.domain,
                samples=candidate.samples,
                statistics_frames=candidate.statistics_frames,
            )
            counts["bytes_down"] += len(encode(release)) + SIGNATURE_BYTES
            counts["releases"] += 1
            self._released.add(candidate.domain)
            self.events.append(f"{self._frame}: release {self._version} for {candidate.domain}, {_told(candidate)}")
            serving = self.adapter.on_release(release)
            if serving is not None:
                self._serve(serving)


def _told(candidate: Candidate) -> str:
    numbers = ", ".join(f"{k} {v:.3g}" for k, v in candidate.metrics.items())
    return f"{candidate.samples} samples: {numbers}"


@dataclass(frozen=True)
class _Source:
    spec: str
    weights: str


@cache
def _bundle() -> Bundle:
    """The student's bundle: `REFOLD_BENCH_BUNDLE`, else exported once into the benchmark's cache."""
    named = os.environ.get("REFOLD_BENCH_BUNDLE")
    if named:
        return Bundle.open(named)
    return student_bundle()


@cache
def _reference() -> Reference:
    bundle = _bundle()
    with np.load(io.BytesIO(bundle.read(bundle.manifest.calibration)), allow_pickle=False) as z:
        return Reference.measure(z["images"])


def _load_teachers(settings: DistilSettings) -> Teachers:
    folder: Path | None = data_folder()
    if folder is None:
        raise InputError(
            "The Refold rows need the teachers' weights: set REFOLD_DATA to the folder that holds them.", code="no-data"
        )
    sources = [_Source(f"demo.models:{make}", str(folder / f"{name}.npz")) for name, make in TEACHERS]
    return load_teachers(sources, _bundle().preprocess, settings)


def _overlay(tuning: Tuning, seed: int) -> RefoldMethod:
    return RefoldMethod(_bundle(), _reference(), None, tuning, seed=seed)


def _distilled(tuning: Tuning, seed: int) -> RefoldMethod:
    return RefoldMethod(_bundle(), _reference(), _load_teachers(tuning.distil), tuning, seed=seed)


def _labels(tuning: Tuning, seed: int) -> RefoldMethod:
    teachers = TrueLabels(_load_teachers(tuning.distil), int(_bundle().manifest.class_count))
    return RefoldMethod(_bundle(), _reference(), teachers, tuning, seed=seed)


METHODS: Mapping[str, Callable[[Tuning, int], RefoldMethod]] = {"overlay": _overlay, "distilled": _distilled, "labels": _labels}


def make_method(name: str, seed: int, tuning: Tuning | None = None) -> RefoldMethod:
    """A fresh device, and cloud where the row has one: "overlay", "distilled" or "labels"."""
    return METHODS[name](tuning or Tuning(), seed)
