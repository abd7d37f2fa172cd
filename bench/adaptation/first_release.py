"""How soon a single device gets its first release in a new domain, and what that is worth.

    python -m bench.adaptation.first_release --corruption contrast --seed 1

One process, the product's own parts and default settings: engine, adapter, selector with its quota, encoder, ingest, store,
worker, distiller, gate, release, adapter. Two devices see the same frames, one without a cloud. When the stream ends, the
states both serve are judged on frames of the same corruption that nobody saw. A release reaches the device `DELAY` frames after
the upload that set off its training or judgement. Needs REFOLD_DATA; REFOLD_BENCH_BUNDLE names another bundle than the
benchmark's own.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from bench.adaptation.method import Log
from bench.adaptation.refold_method import TEACHERS, _bundle, _reference, adapter_and_observer
from bench.corrupt import corrupt
from cloud.bundles import register
from cloud.ingest import Ingest
from cloud.lesson import make_lesson
from cloud.releases import Releases
from cloud.settings import GateSettings, QuotaSettings, WorkerSettings
from cloud.store import DeviceRecord, DirectoryObjects, Store
from cloud.training.waiting import sentence
from cloud.worker import Job, Worker
from demo.images import cifar10, data_folder
from edge.adapt import AdaptSettings, FrameFeatures
from edge.encode import make_sample
from edge.engine import EngineFactory
from edge.link_settings import SelectSettings
from edge.select import NewDomain, NewDomainSelector, make_selector
from edge.serving import ServingState
from refold.errors import InputError
from refold.release import decode
from refold.signing import SigningKey
from refold.v1 import norms_pb2
from refold.v1 import samples_pb2 as pb

__all__ = ["Device", "Service", "run"]

U8 = NDArray[np.uint8]
COHORT = "bench"
HOME_FRAMES, DOMAIN_FRAMES, UNSEEN, DELAY = 200, 1000, 1000, 100
DEVICE = DeviceRecord("bench", COHORT, "0", 2**62)


class Device:
    """Engine, adapter and selector of one device with default settings."""

    def __init__(self) -> None:
        self.bundle = _bundle()
        self._factory = EngineFactory(self.bundle)
        classes = int(self.bundle.manifest.class_count)
        self.adapter, self._observer = adapter_and_observer(self._factory, AdaptSettings(), _reference())
        keep = SelectSettings()
        quota = NewDomain(uploads=keep.new_domain, rate=keep.new_domain_rate)
        inner = make_selector(keep.name, classes, keep.options)
        self._selector = NewDomainSelector(inner, quota, lambda: self.adapter.domain, self.adapter.known_domains)
        self.frames = 0
        self.serve(ServingState(domain="d0"))

    def serve(self, state: ServingState | None) -> None:
        if state is not None:
            self.serving, self._engine = state, self._factory.build(state)

    def step(self, image: U8) -> tuple[pb.SampleHeader, bytes] | None:
        """One frame; returns what is uploaded of it."""
        logits = self._engine.run(self.bundle.preprocess.apply(image))[0].astype(np.float64)
        p = np.exp(logits - logits.max())
        p = (p / p.sum()).astype(np.float32)
        if self.adapter.wants_image(FrameFeatures.of(image, p)):
            self.serve(self._observer.observe(self.frames, image, self.serving))
        verdict = self._selector.judge(p)
        self.frames += 1
        if not verdict.keep:
            return None
        return make_sample(
            image,
            verdict,
            predicted=int(p.argmax()),
            frame=self.frames,
            bundle_digest=self.bundle.digest,
            preprocess_digest=self.bundle.preprocess.digest,
            release_version=self.serving.release_version,
            domain=self.adapter.domain,
            taken_unix_ms=0,
        )

    def accuracy(self, images: U8, labels: NDArray[np.int64]) -> float:
        """Of the state served now, in percent."""
        parts = [self._engine.run(self.bundle.preprocess.apply(images[i : i + 50])) for i in range(0, len(images), 50)]
        return 100 * float((np.concatenate(parts).argmax(1) == labels).mean())


class Service:
    """The cloud's parts between an upload and a release, without the network between them."""

    def __init__(self, folder: Path, distil: dict[str, object]) -> None:
        data = data_folder()
        if data is None:
            raise InputError("The teachers' weights are needed: set REFOLD_DATA to their folder.", code="no-data")
        self.store, objects = Store(f"sqlite:///{folder / 'refold.db'}"), DirectoryObjects(folder / "objects")
        teachers = [(f"demo.models:{make}", str(data / f"{name}.npz")) for name, make in TEACHERS]
        bundle = _bundle()
        self.store.put_device(DEVICE.id, DEVICE.cohort, DEVICE.serial, 2**62)
        register(self.store, objects, bundle.path, teachers)
        workers = WorkerSettings(home=False, interval_s=0)
        self.ingest = Ingest(self.store, objects, QuotaSettings(), workers.held_back)
        self.releases = Releases(self.store, SigningKey.generate())
        self._key = (bundle.digest, COHORT)
        job = Job("", folder, *self._key, workers, GateSettings(), distil)
        self.worker = Worker(job, self.store, objects, bundle, make_lesson(bundle, teachers, distil, threads=1))

    def look(self, frame: int) -> tuple[int, str]:
        """One round of the worker: (version released or 0, what it decided or ""; nothing was due)."""
        self.worker.absorb()
        due = self.worker.due(float(frame))
        if not due:
            return 0, ""
        outcome = self.worker.decide(due[0], float(frame))
        version = self.releases.publish(outcome)
        return (
            version,
            f"{due[0]}: {'released' if version else 'undecided' if outcome.undecided else 'refused'}: {outcome.reason}",
        )


@dataclass
class Told:
    """One stream's outcome; accuracies in percent on unseen frames."""

    corruption: str
    seed: int
    uploads: int = 0
    first_release: int = 0
    alone: float = 0.0
    released: float = 0.0
    events: list[str] = field(default_factory=list)

    def log(self) -> Log:
        return {"uploads": self.uploads, "first_release": self.first_release, "gain": self.released - self.alone}


def run(corruption: str, seed: int, distil: dict[str, object] | None = None, severity: int = 5) -> Told:
    """Streams `HOME_FRAMES` clean and `DOMAIN_FRAMES` corrupted test images; none of them is used again for judging."""
    images, labels = cifar10("test")
    order = np.random.default_rng([seed, *corruption.encode()]).permutation(len(images))
    home, seen, unseen = np.split(order[: HOME_FRAMES + DOMAIN_FRAMES + UNSEEN], [HOME_FRAMES, HOME_FRAMES + DOMAIN_FRAMES])
    shifted = corrupt(corruption, severity, images[np.concatenate([seen, unseen])], seed)
    told = Told(corruption, seed)
    device, alone = Device(), Device()
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), {"seed": seed, **(distil or {})})
        due: list[tuple[int, int]] = []
        for i, image in enumerate(np.concatenate([images[home], shifted[:DOMAIN_FRAMES]])):
            frame = i - HOME_FRAMES
            while due and due[0][0] <= frame:
                _install(device, service, due.pop(0)[1])
                told.first_release = told.first_release or frame
            alone.step(image)
            sample = device.step(image)
            while (report := device.adapter.take_statistics()) is not None:
                service.ingest.statistics(DEVICE, report)
            if sample is None:
                continue
            told.uploads += 1
            service.ingest.upload(DEVICE, [pb.Sample(header=sample[0], payload=sample[1])])
            version, what = service.look(i)
            if what:
                told.events.append(f"frame {frame}: {what}")
            if version:
                due.append((frame + DELAY, version))
        told.events.append(f"end: {sentence(service.worker.waiting())}")
        service.store.close()
    truth = labels[unseen].astype(np.int64)
    told.alone, told.released = (d.accuracy(shifted[DOMAIN_FRAMES:], truth) for d in (alone, device))
    return told


def _install(device: Device, service: Service, version: int) -> None:
    signed: norms_pb2.SignedRelease = service.releases.signed(device.bundle.digest, COHORT, version)
    device.serve(device.adapter.on_release(decode(signed.payload)))


@click.command()
@click.option("--corruption", "corruptions", multiple=True, required=True, help="Repeat for several.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(1,), show_default=True)
@click.option("--severity", type=click.IntRange(1, 5), default=5, show_default=True)
def main(corruptions: tuple[str, ...], seeds: tuple[int, ...], severity: int) -> None:
    """Prints one line of JSON for each corruption and seed."""
    for corruption in corruptions:
        for seed in seeds:
            told: dict[str, Any] = run(corruption, seed, severity=severity).__dict__
            click.echo(json.dumps(told))


if __name__ == "__main__":
    main()
