"""CEMA (Chen et al., ICLR 2024, "Towards robust and efficient cloud-edge elastic model adaptation via selective entropy
distillation") as its paper describes it and as its authors released it: fp32, edge and cloud simulated in one process.

Two selectors exist because the two differ: the paper's dynamic thresholds are switched off in the released configuration, which
uses EATA's redundancy test in their place.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bench.adaptation.method import BatchMethod
from bench.adaptation.nets import Statistics, adaptable, affine_parameters, entropy, norms

__all__ = ["CEMA", "PAPER", "RELEASED", "CEMASettings", "Cloud", "UploadRule"]


@dataclass(frozen=True)
class CEMASettings:
    """Defaults are the released configuration's.

    Attributes:
        student_lr, teacher_lr: SGD with momentum 0.9.
        margin: E_max as a share of ln C.
        low_margin: E_min as a share of ln C; None: no lower bound.
        warm_up: samples after which E_max follows the mean entropy; None: E_max stays.
        redundancy: |cosine| above which an upload is redundant; None: no such test.
        batch: edge batch; group: new uploads per cloud step; replay: old uploads beside each new one.
        replay_from: uploads in the history from which replay starts; history: how many are kept.
        alpha, beta, gamma: weights of the student's entropy, of the distillation, and of the teacher's hard label.
    """

    student_lr: float = 0.0025
    teacher_lr: float = 0.00025
    margin: float = 0.4
    low_margin: float | None = None
    warm_up: int | None = None
    redundancy: float | None = 0.05
    batch: int = 64
    group: int = 32
    replay: int = 3
    replay_from: int = 256
    history: int = 10_000
    idle_batch: int = 128
    alpha: float = 3.0
    beta: float = 3.0
    gamma: float = 1.0


RELEASED = CEMASettings()
PAPER = CEMASettings(low_margin=0.02, warm_up=640, redundancy=None)


class UploadRule:
    """S(x): which predictions of a batch are worth uploading."""

    def __init__(self, settings: CEMASettings, classes: int) -> None:
        self.settings = settings
        self.start = settings.margin * math.log(classes)
        self.floor = -math.inf if settings.low_margin is None else settings.low_margin * math.log(classes)
        self.seen, self.total = 0, 0.0
        self.warm_mean: float | None = None
        self.mean_probabilities: Tensor | None = None

    @property
    def ceiling(self) -> float:
        """E_max: 0.4 ln C, and after the warm-up in proportion to the mean entropy of all predictions so far."""
        if self.warm_mean is None or self.warm_mean <= 0:
            return self.start
        return self.start * (self.total / self.seen) / self.warm_mean

    def select(self, logits: Tensor) -> Tensor:
        """Indices to upload. The running mean entropy takes the batch in before the test, as the released code does."""
        h = entropy(logits)
        self.seen, self.total = self.seen + len(h), self.total + float(h.sum())
        if self.warm_mean is None and self.settings.warm_up is not None and self.seen >= self.settings.warm_up:
            self.warm_mean = self.total / self.seen
        kept = torch.nonzero((h < self.ceiling) & (h > self.floor)).flatten()
        if self.settings.redundancy is None:
            return kept
        probabilities = logits.softmax(1)
        if self.mean_probabilities is not None and len(kept):
            cosine = F.cosine_similarity(self.mean_probabilities[None], probabilities[kept])
            kept = kept[cosine.abs() < self.settings.redundancy]
        if len(kept):
            mean = probabilities[kept].mean(0)
            past = self.mean_probabilities
            self.mean_probabilities = mean if past is None else 0.9 * past + 0.1 * mean
        return kept


class Cloud:
    """Teacher, student, and the two buffers. A step takes `group` new uploads; what is left over waits for the next round."""

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: CEMASettings, classes: int, seed: int = 0) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self.e0 = settings.margin * math.log(classes)
        self.waiting: deque[Tensor] = deque()
        self.history: deque[Tensor] = deque(maxlen=settings.history)
        self.rng = np.random.default_rng(seed)
        self.student_sgd = torch.optim.SGD(affine_parameters(student), lr=settings.student_lr, momentum=0.9)
        self.teacher_sgd = torch.optim.SGD(affine_parameters(teacher), lr=settings.teacher_lr, momentum=0.9)
        self.steps = 0

    def receive(self, uploads: Tensor) -> int:
        """Takes a round's uploads and does every step they allow. Returns how many student steps were made."""
        before = self.steps
        self.waiting.extend(uploads)
        self.history.extend(uploads)
        while len(self.waiting) >= self.settings.group:
            new = torch.stack([self.waiting.popleft() for _ in range(self.settings.group)])
            self._teach(new)
            if len(self.history) >= self.settings.replay_from:
                new = torch.cat([new, self._replay(self.settings.replay * self.settings.group)])
            self._distil(new)
        if self.steps == before and len(self.history) > self.settings.replay_from:
            self._distil(self._replay(self.settings.idle_batch))
        return self.steps - before

    def _replay(self, count: int) -> Tensor:
        chosen = self.rng.choice(len(self.history), min(count, len(self.history)), replace=False)
        return torch.stack([self.history[i] for i in chosen])

    def _teach(self, new: Tensor) -> None:
        """Entropy minimisation of the teacher on the new uploads alone."""
        self.teacher.train()
        h = entropy(self.teacher(new))
        loss = (torch.exp(self.e0 - h.detach()) * h).mean()
        self.teacher_sgd.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.teacher_sgd.step()
        self.teacher.eval()

    def _distil(self, x: Tensor) -> None:
        """One step of the student on its own entropy, the teacher's distribution and the teacher's label."""
        with torch.no_grad():
            target = self.teacher(x)
        self.student.train()
        logits = self.student(x)
        self.student.eval()
        weight = torch.exp(self.e0 - entropy(target))
        h = entropy(logits)
        divergence = F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(1)
        s = self.settings
        loss = (
            s.alpha * (torch.exp(self.e0 - h.detach()) * h).mean()
            + s.beta * (weight * divergence).mean()
            + s.gamma * (weight * F.cross_entropy(logits, target.argmax(1), reduction="none")).mean()
        )
        self.student_sgd.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.student_sgd.step()
        self.steps += 1


class CEMA(BatchMethod):
    """Edge and cloud in one process. The edge serves the student of the round before (K = 1)."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, settings: CEMASettings, classes: int = 10, seed: int = 0
    ) -> None:
        self.batch = settings.batch
        self.rule = UploadRule(settings, classes)
        self.cloud = Cloud(
            adaptable(student, Statistics.RENORM), adaptable(teacher, Statistics.RENORM), settings, classes, seed
        )
        self.edge = copy.deepcopy(self.cloud.student)

    @torch.no_grad()
    def _predict(self, x: Tensor) -> Tensor:
        seeding = not norms(self.edge)[0].seeded
        logits: Tensor = self.edge(x)
        if seeding:  # the edge's first batch gives the student its statistics too: in the released code they are one object
            self.cloud.student.load_state_dict(self.edge.state_dict())
            for norm in norms(self.cloud.student):
                norm.seeded = True
        return logits

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self._predict(x)
        kept = self.rule.select(logits)
        self.counts["frames_uploaded"] += len(kept)
        self.counts["bytes_up"] += len(kept) * x[0].numel()  # raw pictures: one byte a value
        if self.cloud.receive(x[kept]):
            self.edge.load_state_dict(self.cloud.student.state_dict())
            channels = sum(m.weight.numel() for m in norms(self.edge))
            self.counts["bytes_down"] += 8 * channels  # the folded pair (a, b), float32
        return logits
