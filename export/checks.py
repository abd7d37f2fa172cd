"""The self-check: nothing is saved unless the written files do what a bundle promises. Every check leaves its numbers.

integer_layers       every convolution and linear layer really fused to its integer kernel
argmax_float         the engine and the float model choose the same class on the calibration pictures
structure_checked    the file keeps the documented rules of a compiler that is not here (tensorrt)
exported_identical   engine(refold(exported state)) is bit-identical to a model with the values inside
perturbed_identical  engine(refold(state 1 % away)) is bit-identical to a fresh export at that state, integers included
student_*            the cloud's student computes what the engine computes; student_apart is their distance over the
                     distance of the engine from the float model
taps_finite          the tap model runs and gives two moments for each channel
argmax_<target>      where a bundle has several runtimes: the share of pictures on which this one and an earlier target's
                     choose the same class, ties within a step counted as agreement; judged by its confidence interval
difference_accepted  1 where that share was too low and was accepted (--accept-difference)

What a runtime is, and how much it may round, is behind `export.runtimes`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from export.diagnose.intervals import interval
from export.quantise import IntegerModel
from export.runtimes import Runtime, Tolerance, runtime_of
from export.targets import Artefact, TargetProfile
from refold.errors import GateError
from refold.norms import NormKind, NormSite, NormState, NormTable, offset_room

__all__ = ["Evidence", "agree", "perturbed", "run_checks", "student_answers"]

F32 = NDArray[np.float32]
IDENTITY = 4  # pictures on which bit-identity is asked: any difference shows in the first
FLOAT_ERROR = 0.25  # error of the logits over their spread, below which differing argmaxes are near-ties of an undecided net


@dataclass(frozen=True)
class Evidence:
    """What the checks look at: pictures as model input, labels if known, the float model's logits and the student's."""

    x: F32
    labels: NDArray[np.int64] | None
    float_logits: F32
    student_logits: F32
    min_agreement: float = 0.9

    @property
    def step(self) -> float:
        """One of 255 between the lowest and the highest float logit."""
        return float(self.float_logits.max() - self.float_logits.min()) / 255


def run_checks(
    profile: TargetProfile,
    artefact: Artefact,
    model: IntegerModel,
    evidence: Evidence,
    fresh: Callable[[Mapping[str, NormState]], tuple[Artefact, IntegerModel]],
) -> tuple[dict[str, float], F32]:
    """All checks of one target.

    Args:
        fresh: a fresh export at other norm states, its tensors embedded (`export.pipeline.fresh_export`).

    Returns:
        (the numbers for `Target.checks`, the engine's logits of `evidence.x`).

    Raises:
        GateError: naming the check, the layer where there is one, and the reason.
    """
    runtime, target = runtime_of(profile), profile.name
    numbers = runtime.structure(artefact, model) | _integer_layers(target, runtime, artefact, model)
    logits = runtime.logits(artefact, model, evidence.x)
    numbers |= _against_float(target, logits, evidence)
    numbers |= _identities(target, runtime, artefact, model, evidence.x[:IDENTITY], logits[:IDENTITY], fresh)
    numbers |= _student(target, logits, evidence, runtime.tolerance)
    if artefact.taps:
        numbers |= _taps(target, runtime, artefact, model, evidence.x[:IDENTITY])
    return numbers, logits


def agree(
    target: str, logits: F32, other: str, theirs: F32, step: float, least: float = 0.995, *, accepted: bool = False
) -> dict[str, float]:
    """Two runtimes of one bundle must be one model to whoever reads their answers.

    Judged by the 95 % interval of their agreement (Clopper and Pearson 1934): one image of 64 is no
    evidence of more than 0.5 %.

    Args:
        target, logits: the runtime checked, float32 (N, classes).
        other, theirs: a target of another runtime that passed its checks.
        step: how far two logits of a picture may lie apart and still be a tie.
        least: share of pictures on which they must choose the same class.
        accepted: a person takes the difference, whatever it is.

    Raises:
        GateError: they choose different classes too often.
    """
    same, count = _same_class(logits, theirs, step), len(logits)
    low, high = interval(round(same * count), count)
    if high >= least:
        return {f"argmax_{other}": same}
    if not accepted:
        raise GateError(
            f"{target} and {other} choose the same class on only {same:.1%} of {count} pictures (95 % interval {low:.1%} to "
            f"{high:.1%}; at least {least:.1%} is asked) although they hold the same weights: nothing was saved for "
            "it. Leave one of them out, or take the difference with --accept-difference; it is then written into the bundle.",
            code="targets-differ",
        )
    return {f"argmax_{other}": same, "difference_accepted": 1.0}


def _same_class(logits: F32, theirs: F32, step: float) -> float:
    rows, a, b = np.arange(len(logits)), logits.argmax(1), theirs.argmax(1)
    return float(((a == b) | (logits[rows, a] - logits[rows, b] <= step)).mean())


def _integer_layers(target: str, runtime: Runtime, artefact: Artefact, model: IntegerModel) -> dict[str, float]:
    found = runtime.fusion(artefact, model)
    if found.unfused:
        raise GateError(
            f"{target}: {runtime.name} runs {found.unfused[0]} in float although it was written in integers"
            f"{f' (and {len(found.unfused) - 1} more)' if len(found.unfused) > 1 else ''}. "
            f"Export it with --keep-float {found.unfused[0]!r}, or report it with the model.",
            code="not-fused",
            detail=str(dict(found.operators)),
        )
    wanted = len(artefact.fused)
    return {"integer_layers": wanted - len(found.unfused), "integer_layers_expected": wanted}


def _against_float(target: str, logits: F32, evidence: Evidence) -> dict[str, float]:
    truth = evidence.float_logits
    if not np.isfinite(logits).all():
        raise GateError(f"{target}: the integer engine's logits are not finite: nothing was saved.", code="not-finite")
    agreement = float((logits.argmax(1) == truth.argmax(1)).mean())
    error = float(np.sqrt(np.mean((logits - truth) ** 2)) / max(float((truth - truth.mean(0)).std()), 1e-12))
    numbers = {"argmax_float": agreement, "logit_error": error}
    if evidence.labels is not None:
        numbers["accuracy_float"] = float((truth.argmax(1) == evidence.labels).mean())
        numbers["accuracy_int8"] = float((logits.argmax(1) == evidence.labels).mean())
    if agreement < evidence.min_agreement and error > FLOAT_ERROR:
        raise GateError(
            f"{target}: the integer engine chooses the float model's class on only {agreement:.1%} of pictures (error "
            f"{error:.2f} of the logits' spread). Try --correct-bias and --equalise, give more or better pictures, keep the "
            "first or last layers in float (--keep-float), or lower --min-agreement if the model is not trained yet.",
            code="accuracy",
        )
    return numbers


def _identities(
    target: str,
    runtime: Runtime,
    artefact: Artefact,
    model: IntegerModel,
    x: F32,
    logits: F32,
    fresh: Callable[[Mapping[str, NormState]], tuple[Artefact, IntegerModel]],
) -> dict[str, float]:
    states = perturbed(model.table, 0.01)
    cases = {
        "exported_identical": ({}, logits),
        "perturbed_identical": (states, runtime.logits(artefact, model, x, states)),
    }
    numbers = {}
    for name, (case, ours) in cases.items():
        written, again = fresh(case)
        codes = next((n.name for n in model.graph.nodes if n.output in model.weights
                      and not np.array_equal(model.codes(n), again.codes(n))), "")  # fmt: skip
        theirs = runtime.written(written, model, x)
        if codes or not np.array_equal(ours, theirs):
            raise GateError(
                f"{target}: an engine with refolded norms differs from a fresh export at the same state"
                f"{f' (the integers of {codes} differ)' if codes else ''}: it could not be updated safely, nothing was saved.",
                code="not-identical",
                detail=f"{name}: {float(np.abs(ours - theirs).max())}",
            )
        numbers[name] = 1.0
    return numbers


def perturbed(table: NormTable, strength: float, seed: int = 0) -> dict[str, NormState]:
    """Admissible states about `strength` away from the exported ones, every number by another amount.

    Offsets move no further than a quarter of what the channel's int32 bias has room for.
    """
    rng = np.random.default_rng(seed)
    scales = {a.tensor: a.scale for a in table.activations}
    return {site.name: _near(site, strength, rng, scales.get(site.input_tensor, 1.0)) for site in table.norms}


def _near(site: NormSite, strength: float, rng: np.random.Generator, input_scale: float) -> NormState:
    s = site.exported

    def around(values: F32) -> F32:
        return np.asarray(values * rng.uniform(1 - strength, 1 + strength, values.shape), np.float32)

    moved = rng.uniform(-strength, strength, s.beta.shape)
    if site.kind is NormKind.FOLDED:
        room = offset_room(site, s, input_scale) / 4
        moved = np.clip(moved, -room, room)
    beta = s.beta + moved
    if not site.kind.has_statistics:
        return NormState(around(s.gamma), np.asarray(beta, np.float32)) if site.kind is not NormKind.RMS else NormState(
            around(s.gamma), s.beta
        )  # fmt: skip
    mean = s.mean + rng.uniform(-strength, strength, s.mean.shape) * np.sqrt(s.variance)
    return NormState(around(s.gamma), np.asarray(beta, np.float32), np.asarray(mean, np.float32), around(s.variance))


def student_answers(student: bytes, x: F32) -> F32:
    """Logits of the program as it will lie in the bundle, float32 (N, classes); the same for every target."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.load(io.BytesIO(student)).module()
        parts = [program(torch.from_numpy(x[i : i + 32])).numpy() for i in range(0, len(x), 32)]
    return np.concatenate(parts)


def _student(target: str, logits: F32, evidence: Evidence, tolerance: Tolerance) -> dict[str, float]:
    got, step = evidence.student_logits, evidence.step
    same = float((logits.argmax(1) == got.argmax(1)).mean())
    close = float((np.abs(got - logits) <= 2 * step).mean())
    noise = float(np.sqrt(np.mean((logits - evidence.float_logits) ** 2)))
    apart = float(np.sqrt(np.mean((got - logits) ** 2))) / max(noise, step)
    agreed = _same_class(logits, got, 2 * step)  # what may lie two steps apart may tie within two
    alike = interval(round(agreed * len(logits)), len(logits))[1] >= tolerance.argmax
    # A deep net spreads one rounding to every later value: two exact implementations of a ViT of twelve blocks end as two draws
    # of the same noise. They are one model while they choose alike and lie nearer to each other than to float.
    if not (alike and (close >= tolerance.steps or apart <= 1)) and apart > tolerance.noise:
        raise GateError(
            f"{target}: the cloud's student and the engine choose the same class on {same:.1%} of the calibration pictures "
            f"and are within two output steps on {close:.1%}: training it would train another model, so nothing was saved.",
            code="student-differs",
        )
    return {"student_argmax": same, "student_within_two_steps": close, "student_apart": apart}


def _taps(target: str, runtime: Runtime, artefact: Artefact, model: IntegerModel, x: F32) -> dict[str, float]:
    moments = runtime.moments(artefact, model, x)
    channels = sum(s.channels for s in model.table.norms if s.kind.has_statistics)
    if moments.shape != (len(x), 2, channels) or not np.isfinite(moments).all():
        raise GateError(f"{target}: the tap model's moments are not finite: nothing was saved.", code="taps")
    return {"tap_channels": float(channels), "taps_finite": 1.0}
