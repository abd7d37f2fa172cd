"""The refold recipe: what moves gamma and beta, found by ablation (docs/guide/adaptation.md).

Each step sees two kinds of pictures: uploads, with the teachers' sharpened votes as targets, and calibration pictures
restyled to the domain, with their labels. The first kind is real and wrongly labelled now and then, the second rightly
labelled and not quite real; each corrects the other. Statistics are not trained: they are measured on the domain's
population, again and again as the norms before them move.
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
from cloud.distil.restyle import Style
from cloud.distil.settings import DistilSettings
from cloud.distil.student import Student
from refold.bundle import Bundle
from refold.preprocess import Preprocess

__all__ = ["Calibration", "learn"]

U8 = NDArray[np.uint8]
LEAST_STYLE = 8  # pictures of a domain below which its spectrum is not known


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
        student.load({})
        with torch.no_grad():
            parts = [
                student.logits(torch.from_numpy(preprocess.apply(self.images[i : i + 64])))
                for i in range(0, len(self.images), 64)
            ]
        return torch.softmax(torch.cat(parts), 1)


def learn(
    student: Student,
    preprocess: Preprocess,
    images: U8,
    targets: NDArray[np.float32],
    population: U8,
    calibration: Calibration,
    measure: Callable[[], list[Moments]],
    settings: DistilSettings,
    seed: int,
) -> dict[str, float]:
    """Moves the student's gamma and beta.

    Args:
        student: loaded with the states to start from.
        images: uploads, uint8 (N, H, W, 3).
        targets: probabilities for them, float32 (N, classes).
        population: unbiased samples of the domain, uint8 (M, H, W, 3); too few leave restyling out.
        calibration: labelled pictures of the source.
        measure: statistics behind the present gamma and beta.
        seed: of everything random.

    Returns:
        Metrics: mean loss of the first and last tenth of the steps, and how far the parameters moved.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = _Pixels(preprocess)
    uploads = torch.from_numpy(images).permute(0, 3, 1, 2)
    sharp = torch.from_numpy(targets).double() ** settings.sharpen
    wanted = (sharp / sharp.sum(1, keepdim=True)).float()
    trust = torch.from_numpy(targets).max(1).values ** settings.trust
    trust = trust / trust.mean()
    style, source, source_wanted = None, uploads, wanted
    if len(calibration.images) and len(population) >= LEAST_STYLE and settings.restyled > 0:
        source = torch.from_numpy(calibration.images).permute(0, 3, 1, 2)
        start = student.snapshot()
        source_wanted = calibration.targets(student, preprocess, targets.shape[1])
        student.restore(start)
        style = Style(source.float() / 255, torch.from_numpy(population).permute(0, 3, 1, 2).float() / 255)
    restyled = round(settings.group * settings.restyled) if style is not None else 0
    anchor = [p.detach().clone() for p in student.parameters]
    student.trainable(True)
    optimiser = torch.optim.Adam(student.parameters, settings.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.rate, total_steps=settings.steps, pct_start=0.1)
    losses = []
    moments = measure()
    for step in range(settings.steps):
        pick = torch.randint(0, len(uploads), (settings.group - restyled,), generator=generator)
        x = [flip_and_move(uploads[pick].float() / 255, generator)]
        y = [wanted[pick] * trust[pick, None]]  # cross-entropy is linear in its target
        if style is not None:
            pick = torch.randint(0, len(source), (restyled,), generator=generator)
            x.append(style(flip_and_move(source[pick].float() / 255, generator), generator))
            y.append(source_wanted[pick])
        logits = student.logits(pixels.normalise(torch.cat(x)), moments)
        loss = -(torch.cat(y) * torch.log_softmax(logits, 1)).sum(1).mean()
        losses.append(float(loss.detach()))
        if settings.pull > 0:
            loss = loss + settings.pull * sum(((p - a) ** 2).sum() for p, a in zip(student.parameters, anchor, strict=True))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if (step + 1) % settings.refresh == 0:
            moments = measure()
    student.trainable(False)
    tenth = max(len(losses) // 10, 1)
    moved = sum(float(((p - a) ** 2).sum()) for p, a in zip(student.parameters, anchor, strict=True)) ** 0.5
    return {
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
        "moved": moved,
        "restyled": float(restyled > 0),
    }


class _Pixels:
    """The bundle's normalisation for pictures in 0..1, which restyling works on."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._scale = 255 * preprocess.scale
        self._mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess.std).view(1, 3, 1, 1)

    def normalise(self, pictures: Tensor) -> Tensor:
        return (pictures * self._scale - self._mean) / self._std
