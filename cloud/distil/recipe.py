"""The refold recipe: what moves gamma and beta, found by ablation (docs/guide/adaptation.md).

Each step sees two kinds of pictures: uploads, with the teachers' sharpened votes as targets, and calibration pictures
restyled to the domain, with their labels. The first kind is real and wrongly labelled now and then, the second rightly
labelled and not quite real; the less of the shift restyling explains, the fewer of the second kind. Statistics are not
trained: they are measured on the domain's population, again and again as the norms before them move. How far to go along what
was learnt is decided on uploads that were held back: all the way, unless they speak for less or none.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloud.distil.augment import flip_and_move
from cloud.distil.norm_mode import Moments
from cloud.distil.restyle import Style, unexplained
from cloud.distil.settings import DistilSettings
from cloud.distil.student import Student
from refold.bundle import Bundle
from refold.preprocess import Preprocess

__all__ = ["Calibration", "Task", "choose_share", "convincing", "cross_entropies", "held_back", "learn", "lessons"]

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
LEAST_STYLE = 16  # pictures of a domain below which its spectrum is not known
LEAST_HELD_BACK = 8  # pictures below which no length of step can be chosen: a quarter of it is taken
COMPARED = 128  # pictures of each kind for the question what restyling explains
UNJUDGED = 0.25  # of the learnt step, where too few uploads could be held back
SHARES = (1.0, 0.0, 0.25, 0.5, 0.75)  # of the learnt step; the first is taken unless another convinces
DOUBT = 1.5  # standard errors by which another choice must be better: a few dozen pictures say little
DOUBT_LESS = 2.5  # the same for a shorter step: weighed votes have heavy tails, and going all the way is right as a rule
FULL, NONE = 0.15, 0.45  # unexplained part of the shift at which restyled pictures have their full share, and none


@dataclass(frozen=True)
class Calibration:
    """The bundle's calibration slice: images uint8 (N, H, W, 3), labels int64 (N,), empty where unknown."""

    images: U8
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, bundle: Bundle) -> Calibration:
        if not bundle.manifest.calibration:
            return cls(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.int64))
        with np.load(io.BytesIO(bundle.read(bundle.manifest.calibration)), allow_pickle=False) as z:
            labels = z["labels"].astype(np.int64) if "labels" in z.files else np.zeros(0, np.int64)
            return cls(z["images"], labels)

    def targets(self, student: Student, preprocess: Preprocess, classes: int) -> Tensor:
        """Labels as probabilities, float32 (N, classes); what the exported student says where there are none."""
        if len(self.labels) == len(self.images) and (self.labels >= 0).all():
            return nn.functional.one_hot(torch.from_numpy(self.labels), classes).float()
        kept = student.snapshot()
        student.load({})
        with torch.no_grad():
            parts = [
                student.logits(torch.from_numpy(preprocess.apply(self.images[i : i + 64])))
                for i in range(0, len(self.images), 64)
            ]
        student.restore(kept)
        return torch.softmax(torch.cat(parts), 1)


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        images: uploads, uint8 (N, H, W, 3), oldest first.
        targets: the teachers' probabilities for them, float32 (N, classes).
        population: unbiased samples of the domain, uint8 (M, H, W, 3); too few leave restyling out.
        calibration: labelled pictures of the source.
        measure: statistics behind the student's present gamma and beta.
        seed: of everything random.
    """

    images: U8
    targets: F32
    population: U8
    calibration: Calibration
    measure: Callable[[], list[Moments]]
    seed: int


def learn(student: Student, preprocess: Preprocess, task: Task, settings: DistilSettings) -> dict[str, float]:
    """Moves the student's gamma and beta; it must be loaded with the states to start from. Returns metrics."""
    generator = torch.Generator().manual_seed(task.seed)
    held = held_back(len(task.images), settings.held_back, generator)
    taught = np.setdiff1d(np.arange(len(task.images)), held)
    batches = _Batches(student, preprocess, task, taught, settings)
    before = student.snapshot()
    student.trainable(True)
    optimiser = torch.optim.Adam(student.parameters, settings.rate)
    warm = max(0.1, 2 / settings.steps)  # OneCycleLR divides by the warm-up's steps less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.rate, total_steps=settings.steps, pct_start=warm)
    losses = []
    moments = task.measure()
    for step in range(settings.steps):
        x, y = batches.draw(generator)
        loss = -(y * torch.log_softmax(student.logits(x, moments), 1)).sum(1).mean()
        losses.append(float(loss.detach()))
        if settings.pull > 0:
            loss = loss + settings.pull * sum(((p - a) ** 2).sum() for p, a in zip(student.parameters, before, strict=True))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if (step + 1) % settings.refresh == 0:
            moments = task.measure()
    student.trainable(False)
    tenth = max(len(losses) // 10, 1)
    metrics = {
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
        "restyled": batches.restyled / settings.group,
        "unexplained": batches.unexplained,
    }
    return metrics | choose_share(student, preprocess, task, held, before, settings)


def held_back(count: int, share: float, generator: torch.Generator) -> NDArray[np.int64]:
    """Numbers of the uploads that are not taught, in order; none where they would be too few to choose by."""
    held = round(count * share)
    if held < LEAST_HELD_BACK:
        return np.zeros(0, np.int64)
    return np.sort(torch.randperm(count, generator=generator)[:held].numpy())


def choose_share(
    student: Student,
    preprocess: Preprocess,
    task: Task,
    held: NDArray[np.int64],
    before: list[Tensor],
    settings: DistilSettings,
) -> dict[str, float]:
    """Goes back along the step to where held-back uploads agree best with the teachers (their cross-entropy is least)."""
    after = student.snapshot()
    if not len(held):
        student.restore([a + UNJUDGED * (b - a) for a, b in zip(before, after, strict=True)])
        return {"share": UNJUDGED}
    x = torch.from_numpy(preprocess.apply(task.images[held]))
    wanted = lessons(task.targets[held], settings)
    losses = []
    for share in SHARES:
        student.restore([a + share * (b - a) for a, b in zip(before, after, strict=True)])
        losses.append(cross_entropies(student, x, wanted, task.measure(), settings.batch))
    best = convincing(losses, DOUBT_LESS)
    student.restore([a + SHARES[best] * (b - a) for a, b in zip(before, after, strict=True)])
    first, last = (float(losses[i].mean()) for i in (SHARES.index(0.0), best))
    return {"share": SHARES[best], "held_back_loss": last, "held_back_loss_before": first}


def lessons(votes: F32, settings: DistilSettings) -> Tensor:
    """What the student is to learn from votes, (N, classes): sharpened, and weighed by how sure the teachers are.

    An average of several networks is less sure than any of them, and imitating that costs the student more than it teaches;
    what they are unsure of is often wrong. Cross-entropy is linear in its target: a weight on the target is a weight on the
    picture. The weights are 1 in the mean.
    """
    sharp = torch.from_numpy(votes).double() ** settings.sharpen
    trust = torch.from_numpy(votes).max(1).values ** settings.trust
    return (sharp / sharp.sum(1, keepdim=True)).float() * (trust / trust.mean())[:, None]


def cross_entropies(student: Student, x: Tensor, wanted: Tensor, moments: list[Moments], batch: int) -> Tensor:
    """Of the student's answers for x, (N, 3, H, W), against weighed probabilities (N, classes): float32 (N,), nats."""
    with torch.no_grad():
        logits = torch.cat([student.logits(x[i : i + batch], moments) for i in range(0, len(x), batch)])
    return -(wanted * torch.log_softmax(logits, 1)).sum(1)


def convincing(losses: list[Tensor], doubt: float = DOUBT) -> int:
    """Which choice has the least mean loss; the first one, unless another is better by more than its standard error."""
    best = min(range(len(losses)), key=lambda i: float(losses[i].mean()))
    gain = losses[0] - losses[best]
    return best if float(gain.mean()) > doubt * float(gain.std()) / len(gain) ** 0.5 else 0


class _Batches:
    """Draws steps of uploads and restyled calibration pictures."""

    def __init__(
        self, student: Student, preprocess: Preprocess, task: Task, taught: NDArray[np.int64], settings: DistilSettings
    ) -> None:
        self._scale = 255 * preprocess.scale
        self._mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess.std).view(1, 3, 1, 1)
        self._group = settings.group
        self._uploads = torch.from_numpy(task.images[taught]).permute(0, 3, 1, 2)
        self._wanted = lessons(task.targets[taught], settings)
        self.restyled = 0
        self.unexplained = 1.0
        if len(task.calibration.images) and len(task.population) >= LEAST_STYLE and settings.restyled > 0:
            self._source = torch.from_numpy(task.calibration.images).permute(0, 3, 1, 2)
            self._source_wanted = task.calibration.targets(student, preprocess, task.targets.shape[1])
            domain = torch.from_numpy(task.population).permute(0, 3, 1, 2).float() / 255
            self._style = Style(self._source.float() / 255, domain)
            self.unexplained = self._left_over(student, domain, task)
            share = settings.restyled * min(max((NONE - self.unexplained) / (NONE - FULL), 0.0), 1.0)
            self.restyled = round(settings.group * share)

    def _left_over(self, student: Student, domain: Tensor, task: Task) -> float:
        generator = torch.Generator().manual_seed(task.seed)
        moments = task.measure()
        source = self._source[:COMPARED].float() / 255
        known, other = domain[::2][-COMPARED:], domain[1::2][-COMPARED:]  # a style always fits the pictures it came from
        restyled = Style(self._source.float() / 255, known)(source, generator)
        return unexplained(*(student.observe(self._normalise(k), moments) for k in (other, restyled, source, known)))

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (group, 3, H, W) and targets (group, classes) of one step."""
        pick = torch.randint(0, len(self._uploads), (self._group - self.restyled,), generator=generator)
        x, y = [flip_and_move(self._uploads[pick].float() / 255, generator)], [self._wanted[pick]]
        if self.restyled:
            pick = torch.randint(0, len(self._source), (self.restyled,), generator=generator)
            x.append(self._style(flip_and_move(self._source[pick].float() / 255, generator), generator))
            y.append(self._source_wanted[pick])
        return self._normalise(torch.cat(x)), torch.cat(y)

    def _normalise(self, pictures: Tensor) -> Tensor:
        return (pictures * self._scale - self._mean) / self._std
