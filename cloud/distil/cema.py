"""CEMA's cloud side (Chen et al., ICLR 2024), step for step as specs/cema.md section 1.3, through the quantised student.

For every full group of 32 new uploads: (1) one entropy step of each teacher on the new uploads, norms in training mode;
(2) one distillation step of the student on those 32 and, once 256 are known, 96 random older ones; teacher logits recomputed
after step 1. Norms are batch-renormalised: their value is that of running statistics, their gradient that of batch
statistics, and the running statistics are seeded from the first batch and follow with momentum 0.1. Both presets share this;
they differ in which samples the device uploads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cloud.distil.norm_mode import Moments, NormCall, NormMode
from cloud.distil.settings import DistilSettings
from cloud.distil.student import Student
from cloud.distil.teachers import Teachers
from cloud.training.strategies.cema import terms
from cloud.training.strategies.formulae import confidence_weight, entropy, reliable_below
from refold.norms import NormState

__all__ = ["CemaLoop", "Renorm"]

GROUP = 32
WARM = 256
REPLAY = 96
STUDENT_RATE, TEACHER_RATE, MOMENTUM = 0.0025, 0.00025, 0.9
ALPHA, BETA, GAMMA = 3.0, 3.0, 1.0
FOLLOW = 0.1  # running statistics


class Renorm:
    """Test-time batch renormalisation of one network: running moments of every norm, empty until the first batch."""

    def __init__(self) -> None:
        self.running: list[Moments] = []

    def train(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Output in training mode; the running moments follow this batch."""
        seeding = not self.running
        batch: list[Moments] = []

        def rule(call: NormCall) -> Tensor:
            seen = call.observed()
            batch.append(Moments(seen.mean.detach(), seen.variance.detach()))
            if seeding:
                return call.normalise(seen)
            run = self.running[call.number]
            sd = torch.sqrt(seen.variance + call.epsilon)
            run_sd = torch.sqrt(run.variance + call.epsilon)
            shape = (1, -1, *([1] * (call.x.dim() - 2)))
            r = (sd / run_sd).detach().view(shape)
            d = ((seen.mean - run.mean) / run_sd).detach().view(shape)
            y = (call.x - seen.mean.view(shape)) / sd.view(shape) * r + d
            if call.gamma is not None:
                y = y * call.gamma.view(shape)
            return y if call.beta is None else y + call.beta.view(shape)

        with NormMode(rule):
            out = network(x)
        if seeding:
            self.running = batch
        else:
            self.running = [
                Moments(a.mean + FOLLOW * (b.mean - a.mean), a.variance + FOLLOW * (b.variance - a.variance))
                for a, b in zip(self.running, batch, strict=True)
            ]
        return out

    def evaluate(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Output with the running moments; the network's own before the first batch."""
        with torch.no_grad(), NormMode(lambda c: c.normalise(self.running[c.number] if self.running else c.source)):
            return network(x)


class _Parameters:
    """Parameters that several loops share in turn: each loop keeps its own values and its own optimiser."""

    def __init__(self, tensors: Sequence[Tensor], rate: float) -> None:
        self.tensors = list(tensors)
        self.values = [t.detach().clone() for t in tensors]
        self.optimiser = torch.optim.SGD(self.tensors, rate, momentum=MOMENTUM)

    def enter(self) -> None:
        with torch.no_grad():
            for t, v in zip(self.tensors, self.values, strict=True):
                t.copy_(v)
        for t in self.tensors:
            t.requires_grad_(True)

    def leave(self, source: Sequence[Tensor] = ()) -> None:
        """Keeps the values; puts back `source`, where given, for whoever uses the network next."""
        self.values = [t.detach().clone() for t in self.tensors]
        with torch.no_grad():
            for t, v in zip(self.tensors, source, strict=bool(source)):
                t.copy_(v)
        for t in self.tensors:
            t.requires_grad_(False)

    def step(self, loss: Tensor) -> None:
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()


class CemaLoop:
    """State of one CEMA run: buffers, running statistics, optimisers. Deterministic by seed and order of uploads."""

    def __init__(self, student: Student, teachers: Teachers, settings: DistilSettings, classes: int) -> None:
        self._student = student
        self._teachers = teachers
        self._settings = settings
        self._threshold = reliable_below(classes)
        self._fresh: list[Tensor] = []
        self._history: deque[Tensor] = deque(maxlen=settings.replay)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._renorm = Renorm()
        self._teacher_renorms = [Renorm() for _ in teachers.teachers]
        student.load({})
        self._norms = _Parameters(student.parameters, STUDENT_RATE)
        self._teacher_norms: list[_Parameters] | None = None
        self._teacher_source: list[list[Tensor]] = []

    def add(self, x: Tensor) -> None:
        """Takes uploads, preprocessed, float32 (N, 3, H, W)."""
        self._fresh.extend(x)

    def run(self) -> dict[str, float]:
        """Every step that is due; a replay-only step where no group is full but the history is warm."""
        self._enter()
        steps = 0
        weights: list[float] = []
        while len(self._fresh) >= GROUP:
            group = torch.stack(self._fresh[:GROUP])
            del self._fresh[:GROUP]
            self._teacher_steps(group)
            replay = self._sample(REPLAY) if len(self._history) >= WARM else []
            self._history.extend(group)
            weights.append(self._student_step(torch.cat([group, torch.stack(replay)]) if replay else group))
            steps += 1
        if not steps and len(self._history) > WARM:
            weights.append(self._student_step(torch.stack(self._sample(GROUP + REPLAY))))
            steps = 1
        self._leave()
        return {"steps": float(steps), "mean_weight": float(sum(weights) / max(len(weights), 1))}

    def states(self) -> dict[str, NormState]:
        """The student's norms as they are, running statistics included."""
        self._student.load({})
        self._norms.enter()
        moments = self._renorm.running or self._student.exported_moments()
        states = self._student.states(self._student.clamp(moments))
        self._norms.leave()
        return states

    def _sample(self, count: int) -> list[Tensor]:
        order = torch.randperm(len(self._history), generator=self._generator)[:count]
        return [self._history[int(i)] for i in order]

    def _enter(self) -> None:
        self._student.load({})
        self._norms.enter()
        if self._teacher_norms is None:
            example = self._fresh[0][None] if self._fresh else torch.zeros(0)
            self._teacher_norms = []
            if example.numel():
                for teacher in self._teachers.teachers:
                    tensors = teacher.affine(example)
                    self._teacher_source.append([t.detach().clone() for t in tensors])
                    self._teacher_norms.append(_Parameters(tensors, TEACHER_RATE))
        for norms in self._teacher_norms:
            norms.enter()

    def _leave(self) -> None:
        self._norms.leave()
        for norms, source in zip(self._teacher_norms or [], self._teacher_source, strict=True):
            norms.leave(source)

    def _weight(self, uncertainty: Tensor) -> Tensor:
        return confidence_weight(uncertainty, self._threshold, self._settings.loss_cap)

    def _teacher_steps(self, group: Tensor) -> None:
        for teacher, renorm, norms in zip(
            self._teachers.teachers, self._teacher_renorms, self._teacher_norms or [], strict=True
        ):
            uncertainty = entropy(renorm.train(teacher.network, group))
            norms.step((self._weight(uncertainty) * uncertainty).mean())

    def _student_step(self, x: Tensor) -> float:
        votes = [
            torch.softmax(renorm.evaluate(t.network, x), 1)
            for t, renorm in zip(self._teachers.teachers, self._teacher_renorms, strict=True)
        ]
        target = torch.stack(votes).mean(0)
        weight = self._weight(-(target * torch.log(target.clamp_min(1e-12))).sum(1))
        logits = self._renorm.train(self._student.logits, x)
        own, divergence, label = terms(logits, target, self._threshold, self._settings.loss_cap)
        self._norms.step(ALPHA * own.mean() + BETA * divergence.mean() + GAMMA * label.mean())
        return float(weight.mean())
