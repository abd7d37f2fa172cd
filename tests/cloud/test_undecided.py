"""A worker whose evidence does not suffice: it says what is missing, keeps its candidate, and judges it again later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fleet_of import COHORT, population, sample, shifted
from school_of_tests import make
from small_nets import images

from cloud.bundles import register
from cloud.gating.verdict import GateResult
from cloud.ingest import Ingest
from cloud.lesson import Lesson
from cloud.releases import Outcome, Releases
from cloud.settings import GateSettings, QuotaSettings, WorkerSettings
from cloud.store import DeviceRecord, DirectoryObjects, Store
from cloud.training.waiting import Waiting, levels, look, sentence
from cloud.worker import Job, Worker
from refold.bundle import Bundle
from refold.signing import SigningKey

DEVICE = DeviceRecord("gate-7", COHORT, "0", 2**62)
FEW = {"held_back": 8, "shifted_clean_points": 100.0}
NEVER = {**FEW, "standard_errors": 50.0, "harm_errors": 50.0, "tolerated_points": 0.01}


class Cloud:
    """A worker in this process, with its store; `upload` sends misty images, as a device would."""

    def __init__(self, folder: Path, bundle: Bundle, lesson: Callable[[Bundle], Lesson], **gate: float) -> None:
        self.bundle, self.folder, self.lesson, self.gate = bundle, folder, lesson, GateSettings(**gate)  # type: ignore[arg-type]
        self.store = Store(f"sqlite:///{folder / 'refold.db'}")
        self.objects = DirectoryObjects(folder / "objects")
        self.store.put_device(DEVICE.id, COHORT, DEVICE.serial, DEVICE.expires_ms)
        register(self.store, self.objects, bundle.path, [])
        self.ingest = Ingest(self.store, self.objects, QuotaSettings(), 0.25)
        self.releases = Releases(self.store, SigningKey.generate())
        self.worker = self.start()

    def start(self) -> Worker:
        job = Job("", self.folder, self.bundle.digest, COHORT, WorkerSettings(interval_s=0), self.gate, {})
        return Worker(job, self.store, self.objects, self.bundle, self.lesson(self.bundle))

    def upload(self, count: int, seed: int, domain: str = "d1") -> None:
        misty = shifted(images(count, 16, seed))
        _, report = population(self.bundle, misty)
        report.domain = domain
        self.ingest.statistics(DEVICE, report)
        self.ingest.upload(DEVICE, [sample(self.bundle, m, domain) for m in misty])

    def held_out(self) -> list[str]:
        return [r.digest for r in self.store.held_back(self.bundle.digest, COHORT, "d1", 1000)]

    def look(self, worker: Worker | None = None) -> list[Outcome]:
        """Everything that is due now, decided and stored."""
        worker, made = worker or self.worker, []
        worker.absorb()
        while due := worker.due(1e9 + len(made)):
            made.append(worker.decide(due[0], 1e9 + len(made)))
            self.releases.publish(made[-1])
        return made

    @property
    def states(self) -> list[str]:
        return [r.state for r in self.store.releases()]


def school(bundle: Bundle) -> Lesson:
    return make(bundle, [], {}, threads=1)


@pytest.fixture
def cloud(tmp_path: Path, small: Bundle) -> Iterator[Callable[..., Cloud]]:
    made: list[Cloud] = []

    def build(lesson: Callable[[Bundle], Lesson] = school, **gate: float) -> Cloud:
        made.append(Cloud(tmp_path, small, lesson, **gate))
        return made[-1]

    yield build
    for one in made:
        one.store.close()


def test_a_candidate_whose_held_out_images_cannot_be_read_waits(cloud: Callable[..., Cloud]) -> None:
    here = cloud(**FEW)
    here.upload(48, 3)
    whole = {digest: here.objects.get(digest) for digest in here.held_out()}
    for digest in whole:
        here.objects.path(digest).write_bytes(b"damaged")
    (outcome,) = here.look()
    assert outcome.undecided and not outcome.passed and "0 held-out samples could be read" in outcome.reason
    assert here.states == ["undecided"] and here.releases.current(here.bundle.digest, COHORT) == 0
    assert not here.look()  # nothing new: nothing is judged
    for digest, content in whole.items():
        here.objects.path(digest).write_bytes(content)
    for seed in range(4, 12):
        if here.worker._kept["d1"].due(len(here.held_out())):
            break
        here.upload(6, seed)
    assert [o.passed for o in here.look()] == [True]
    assert here.states == ["undecided", "released"]


def test_an_undecided_candidate_is_refused_in_the_end_and_training_goes_on(cloud: Callable[..., Cloud]) -> None:
    here = cloud(**{**NEVER, "judgements": 2, "more_evidence": 1.01})
    here.upload(48, 3)
    (first,) = here.look()
    assert first.undecided and "could be shown" in first.reason and "would rule out" in first.reason
    trained = here.worker._lesson.distiller.trained.copy()
    here.upload(12, 4)
    (second,) = here.look()
    assert not second.undecided and "after 2 judgements" in second.reason
    assert here.worker._lesson.distiller.trained == trained  # judged again, not trained again
    assert here.states == ["undecided", "refused"]
    here.upload(40, 5)
    (third,) = here.look()
    assert third.undecided and here.worker._lesson.distiller.trained != trained


def test_a_new_training_takes_the_place_of_a_kept_candidate(cloud: Callable[..., Cloud]) -> None:
    here = cloud(**NEVER)
    here.upload(48, 3)
    here.look()
    kept = here.worker._kept["d1"]
    here.upload(40, 4)
    here.look()
    assert here.worker._kept["d1"].judgements == 1 and here.worker._kept["d1"].candidate is not kept.candidate


def test_a_restarted_worker_makes_an_undecided_candidate_again(cloud: Callable[..., Cloud]) -> None:
    here = cloud(**NEVER)
    here.upload(48, 3)
    (first,) = here.look()
    (again,) = here.look(here.start())
    assert again.undecided and again.reason == first.reason and again.payload == first.payload
    decided = cloud(**FEW)
    decided.look()
    assert decided.states[-1] == "released" and not decided.look(decided.start())


class Silent:
    """A teacher that answers the same to everything, or not at all."""

    def __init__(self, value: float) -> None:
        self.value = value

    def probabilities(self, images: np.ndarray, domain: str) -> np.ndarray:
        if self.value < 0:
            raise RuntimeError("out of memory")
        return np.full((len(images), 5), self.value, np.float32)


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (None, "there is no teacher"),
        (Silent(0.2), "the same"),
        (Silent(np.nan), "no probabilities"),
        (Silent(-1), "out of memory"),
    ],
)
def test_teachers_that_say_nothing_release_nothing(cloud: Callable[..., Cloud], teacher: Silent | None, reason: str) -> None:
    here = cloud(lambda bundle: Lesson(school(bundle).distiller, teacher), **FEW)
    here.upload(48, 3)
    (outcome,) = here.look()
    assert here.states == ["refused"] and reason in outcome.reason


# What is missing, in numbers ------------------------------------------------------------------------------------------------


class Counting:
    def __init__(self, **progress: tuple[int, int]) -> None:
        self._progress = progress

    def progress(self) -> dict[str, tuple[int, int]]:
        return self._progress


def test_what_is_missing_is_said_in_numbers() -> None:
    settings = GateSettings(held_back=16)
    found = look(
        Counting(d1=(41, 64), d2=(7, 64), d0=(90, 64)), {"d1": 9, "d2": 1, "d0": 30}.__getitem__, {}, settings, home=False
    )
    assert found == [Waiting("d1", 41, 64, 9, 16), Waiting("d2", 7, 64, 1, 16)]
    assert sentence(found) == (
        "waiting for evidence: d1: 41 of 64 samples, 9 of 16 held out; d2: 7 of 64 samples, 1 of 16 held out"
    )
    assert look(Counting(d0=(90, 64)), lambda domain: 30, {}, settings, home=True)[0].domain == "d0"
    assert sentence([]) == "waiting for evidence: no samples to train on yet"
    assert look(object(), lambda domain: 0, {}, settings, home=True) == []
    many = [Waiting(f"d{i}", 1, 64, 0, 16) for i in range(9)]
    assert sentence(many).endswith("; 5 more domains")
    assert ({"bundle": "b" * 16, "cohort": "c", "domain": "d1", "kind": "held_out"}, 9.0) in levels("b" * 64, "c", found)


def test_a_kept_candidate_waits_for_held_out_samples_alone(cloud: Callable[..., Cloud]) -> None:
    here = cloud(**NEVER)
    here.upload(48, 3)
    here.look()
    (found,) = here.worker.waiting()
    held = len(here.held_out())
    assert found.undecided and (found.held_out, found.held_out_wanted) == (held, int(np.ceil(1.25 * held)))
    assert f"d1: undecided, {held} of {int(np.ceil(1.25 * held))} held out" in sentence([found])


def test_a_result_is_passed_or_undecided_or_neither() -> None:
    refused = GateResult.refused("a", "b")
    assert not refused.passed and not refused.undecided and refused.reasons == ("a", "b")
