"""`refold export`, told from end to end:

    load_model ─► capture ─► rules ─► place ─► quantise weights ─► calibrate ─► integer_model
                                                                                    │
                     write_bundle ◄─ run_checks ◄─ student_program ◄─ target writers ◄┘

Nothing is written to disk before every check has passed. With `--target all` a target that fails is left out, with its reason.
"""

from __future__ import annotations

import fnmatch
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from export.bits import EIGHT, BitPlan
from export.calibrate import Calibration
from export.capture import capture
from export.checks import F32, Evidence, agree, run_checks, student_answers
from export.diagnose import Finding, diagnose
from export.diagnose.channels import lost_channels
from export.diagnose.held_out import HeldOut
from export.diagnose.labels import checked
from export.diagnose.runtimes import differing
from export.frontend.faults import Steps, blamed
from export.frontend.truth import captured as captured_of
from export.frontend.truth import hold_to_module
from export.given import Given, taken, with_constants
from export.ir import Graph
from export.operators import OPERATORS, Role
from export.pictures import Pictures
from export.placement import is_integer_layer
from export.ptq import LayerSensitivity, SharedScale, compare
from export.quantise import (
    IntegerModel,
    integer_model,
    quantised_weights,
)
from export.rounding import Rounding, prepared, round_off_shared
from export.runtimes import runtime_of
from export.scales import Scale
from export.statistics.build import GRAPH, MOMENTS, Statistics, build_statistics
from export.statistics.check import check_statistics
from export.student import student_program
from export.targets import TARGETS, Artefact, TargetProfile, target_named, write
from refold import __version__
from refold.atomic import check_output
from refold.bundle import Bundle, write_bundle
from refold.codec import table_to_pb
from refold.errors import GateError, ModelError, RefoldError, UsageError
from refold.norms import NormSite, NormState
from refold.packing import pack, packed_size, weights_to_bytes
from refold.preprocess import Preprocess
from refold.signing import SigningKey
from refold.v1 import manifest_pb2 as pb

__all__ = ["EVERY_TARGET", "MOST_PICTURES", "Exported", "Options", "Recipe", "export_model", "fresh_export", "make_recipe"]

Progress = Callable[[str], None]
BEHIND_A_NORM = ("clamp", "reshape", "transpose", "slice", "pad", "max_pool", "expand_constant", "upsample_nearest")
EVERY_TARGET = "all"
MOST_PICTURES = 2048  # in a bundle: 6 MB of 32x32; the device compares its frames with them, the cloud restyles them


@dataclass(frozen=True)
class Options:
    """What a person may choose.

    Attributes:
        targets: names of `export.targets.TARGETS`; one set of integers serves all: the narrowest sets the weight codes. "all"
            is every target that is possible here; at least one must be.
        observer: auto, minmax, percentile, entropy or mse.
        bits: of each layer's weights and activations.
        budget: bytes the integer layers' weights may take; their bits are then chosen by sensitivity, but where `bits` speaks.
        equalise, correct_bias: `export.ptq`; each is kept where the integer network's output error falls.
        keep_float: globs of layer names that stay in float.
        min_agreement: share of calibration pictures (and of validation images) on which the engine must choose the float
            model's class.
        accept_difference: keep a target whose runtime chooses other classes than the bundle's other runtime; the difference is
            measured and written into the bundle.
        strict: refuse where a diagnosis finds something doubtful (`export.diagnose`).
    """

    targets: Sequence[str] = ("ort-x86-avx2",)
    name: str = "model"
    classes: Sequence[str] = ()
    observer: str = "auto"
    bits: BitPlan = EIGHT
    budget: int | None = None
    equalise: bool = False
    correct_bias: bool = False
    keep_float: Sequence[str] = ()
    min_agreement: float = 0.9
    accept_difference: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Recipe:
    """All that an export depends on besides the norm states: the captured float graph and what calibration fixed.

    Attributes:
        graph: as captured, norms apart, weights in float.
        truth: what the integers stand for: the float graph after its rules, before any bias was corrected.
        model: the integer model at the exported state.
        treated: name of a treatment (`export.ptq`) → the output error (without it, with it); the smaller was kept.
        sensitivities: by layer, where a budget decided.
        shared: values that stay in float because one scale would lose outputs (`export.ptq.shared_scale`).
    """

    graph: Graph
    scales: Mapping[str, Scale]
    qmax: int
    bits: BitPlan
    targets: tuple[TargetProfile, ...]
    model: IntegerModel
    calibration: Calibration
    truth: Graph
    given: Given | None = None
    treated: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sensitivities: tuple[LayerSensitivity, ...] = ()
    shared: tuple[SharedScale, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A finished export: the bundle on disk, the recipe for fresh exports, and each target's check numbers.

    Attributes:
        refused: with `--target all`, the targets that were left out, each with the sentence that says why.
        findings: what is doubtful about the model, the images or the integers; also in the bundle.
    """

    bundle: Bundle
    recipe: Recipe
    checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def make_recipe(
    model: nn.Module | ExportedProgram,
    preprocess: Preprocess,
    pictures: Pictures,
    options: Options = Options(),
    progress: Progress = lambda what: None,
    given: Given | None = None,
) -> Recipe:
    """Captures, calibrates and quantises; writes nothing.

    Args:
        given: the integers and scales of a training, taken as they are in place of rounding and calibration.

    Raises:
        ModelError, InputError: see `export.capture`, `export.calibrate` and `export.quantise`.
    """  # fmt: skip
    if not options.targets:
        raise UsageError("Name at least one --target.")
    targets = tuple(TARGETS.values()) if EVERY_TARGET in options.targets else tuple(
        target_named(t) for t in dict.fromkeys(options.targets)
    )  # fmt: skip
    if EVERY_TARGET not in options.targets:
        for target in targets:
            runtime_of(target)  # a package that is missing is said before minutes of calibration
    progress("capturing the model")
    x = preprocess.apply(pictures.images)
    if given is None:
        captured, reference = captured_of(model, x)
    else:
        captured = with_constants(capture(model, preprocess.height, preprocess.width), given)
    captured = _marked(captured, options.keep_float)
    graph, placement = prepared(captured)
    options.bits.check(graph)
    qmax = min(t.qmax for t in targets)
    if not any(is_integer_layer(placement, n) for n in graph.nodes):
        raise ModelError("The model has no convolution or linear layer that can run in integers.", code="no-layers")
    if given is not None:
        calibration = taken(given, graph, placement, x, qmax)
        integers = replace(
            integer_model(
                graph,
                placement,
                given.weights,
                calibration.scales,
                qmax,
                peak=calibration.peak,
                power_of_two=given.power_of_two,
            ),
            stored=given.stored,
        )
        return Recipe(captured, calibration.scales, qmax, options.bits, targets, integers, calibration, graph, given)
    how = Rounding(options.observer, options.bits, options.budget, options.equalise, options.correct_bias)
    found, shared = round_off_shared(captured, x, qmax, how, progress)
    best = found.best
    hold_to_module(reference, captured, found.truth, best.calibration.float_logits, x)
    integers = integer_model(
        best.graph, best.placement, best.weights, best.calibration.scales, qmax, peak=best.calibration.peak
    )
    return Recipe(
        best.captured,
        best.calibration.scales,
        qmax,
        found.plan,
        targets,
        integers,
        best.calibration,
        found.truth,
        None,
        found.treated,
        found.sensitivities,
        shared,
    )


def _marked(graph: Graph, keep_float: Sequence[str]) -> Graph:
    hit = set()
    for index, node in enumerate(graph.nodes):
        for glob in keep_float:
            if OPERATORS[node.op].role is Role.INTEGER and fnmatch.fnmatchcase(node.name, glob):
                graph.nodes[index] = node.with_attributes(keep_float=True)
                hit.add(glob)
    missed = [g for g in keep_float if g not in hit]
    if missed:
        raise UsageError(
            f"--keep-float {missed[0]!r} fits no layer; the layers are named as in the model, e.g. {graph.nodes[0].name}."
        )
    return graph


def fresh_export(
    recipe: Recipe, states: Mapping[str, NormState], target: TargetProfile | None = None
) -> tuple[Artefact, IntegerModel]:
    """A whole export at other norm states, from the float weights, with the recipe's calibration; tensors inside the file.

    This is what an engine with refolded norms is compared with: the norms are put into the float graph, and rules, weight
    quantisation, norm table and writer run again. Only activation scales and the floors of dead channels are taken over.

    Args:
        states: by site name; sites left out are as exported.
        target: of the recipe's; default: the first.

    Returns:
        (files, integers) at that state.
    """
    captured = recipe.graph.copy()
    for node in captured.nodes:
        state = states.get(node.site) if node.site else None
        for role, name in node.parameters.items() if state is not None else ():
            captured.constants[name] = getattr(state, role)
    graph, placement = prepared(captured)
    anchors: dict[str, NormSite] = {s.name: s for s in recipe.model.table.sites}
    given, known = recipe.given, recipe.model
    weights = known.weights if given is not None else quantised_weights(graph, placement, recipe.qmax, recipe.bits)
    shifts = given is not None and given.power_of_two
    model = integer_model(graph, placement, weights, recipe.scales, recipe.qmax, anchors, known.peak, shifts)
    model = replace(model, stored=known.stored)
    return write(target or recipe.targets[0], model, embedded=True), model


def export_model(
    model: nn.Module | ExportedProgram,
    output: Path,
    preprocess: Preprocess,
    pictures: Pictures,
    options: Options = Options(),
    *,
    keys: Sequence[SigningKey] = (),
    progress: Progress = lambda what: None,
    given: Given | None = None,
    validation: Pictures | None = None,
) -> Exported:
    """Exports a model into `output`.

    Args:
        model: in evaluation mode, with its weights.
        pictures: calibration; at most `MOST_PICTURES` of them go into the bundle.
        given: of a training; its own forward pass then takes the float model's place in the checks.
        validation: images that neither training nor calibration saw; accuracy and agreement are measured on them. They do not
            go into the bundle, the numbers do.

    Raises:
        ModelError, InputError, UsageError: the model or the pictures cannot be used.
        GateError: a self-check failed, or with `strict` something is doubtful; nothing was written.
        StorageError: the disk is full or not writable.
        InternalError: a fault of Refold's, with what was being done.
    """  # fmt: skip
    steps = Steps(progress)
    with blamed(steps.told):
        return _exported(model, output, preprocess, pictures, options, keys, steps, given, validation)


def _exported(
    model: nn.Module | ExportedProgram, output: Path, preprocess: Preprocess, pictures: Pictures, options: Options,
    keys: Sequence[SigningKey], progress: Progress, given: Given | None, validation: Pictures | None,
) -> Exported:  # fmt: skip
    check_output(output)
    recipe = make_recipe(model, preprocess, pictures, options, progress, given)
    classes = recipe.model.graph.shapes[recipe.model.graph.output][-1]
    if options.classes and len(options.classes) != classes:
        raise UsageError(f"--classes names {len(options.classes)} classes; the model has {classes} outputs.")
    pictures, doubts = checked(pictures, classes, "calibration")
    progress("looking for doubtful inputs")
    truth, findings = recipe.calibration.float_logits, list(doubts)
    if given is None:  # a training knows its images and labels already
        findings += diagnose(recipe.truth, recipe.model.table, pictures, preprocess, truth)
    held_out = None if validation is None else HeldOut(recipe.truth, validation, pictures, preprocess, classes)
    findings += [] if held_out is None else held_out.findings
    if options.strict:
        _refuse(findings)
    progress("measuring statistics by class")
    x = preprocess.apply(pictures.images)
    statistics = build_statistics(recipe.model, x, truth)
    progress("writing the student")
    student = student_program(recipe.model)
    manifest = _manifest(recipe, preprocess, options, classes, compare(recipe.truth, recipe.model, x))
    parts = {manifest.student: student, manifest.calibration: _calibration_part(pictures)}
    if statistics is not None:
        manifest.statistics, manifest.class_moments = GRAPH, MOMENTS
        parts |= statistics.parts(recipe.model)
    evidence = Evidence(x, pictures.labels, truth, student_answers(student, x), options.min_agreement)
    checks: dict[str, dict[str, float]] = {}
    answers: dict[str, F32] = {}
    refused: dict[str, str] = {}
    for target in recipe.targets:
        progress(f"writing and checking {target.name}")
        try:
            artefact, numbers, doubted = _checked(recipe, target, evidence, answers, options, held_out, statistics)
        except RefoldError as e:
            if EVERY_TARGET not in options.targets:
                raise
            refused[target.name] = e.message
            continue
        checks[target.name], findings = numbers, [*findings, *doubted]
        entry = manifest.targets.add(name=target.name, weight_bits=recipe.model.bits)
        entry.updatable = not target.compiled_on_device  # there the device decides, once it has built an engine
        entry.model = f"targets/{target.name}/{target.model}"
        parts[entry.model] = artefact.model
        if artefact.taps:
            entry.taps = f"targets/{target.name}/{target.taps}"
            parts[entry.taps] = artefact.taps
        for name, content in artefact.beside.items():
            parts[f"targets/{target.name}/{name}"] = content
        if artefact.packed:
            manifest.packed = "weights.packed"
            parts[manifest.packed] = weights_to_bytes({n: pack(w.codes, w.bits) for n, w in artefact.packed.items()})
        for name, value in checks[target.name].items():
            entry.checks[name] = value
    if not checks:
        raise GateError(
            f"No target is possible. {' '.join(f'{name}: {why}' for name, why in refused.items())}", code="no-target"
        )
    if options.strict:
        _refuse(findings)
    for finding in findings:
        manifest.findings.add(code=finding.code, message=finding.message, numbers=finding.numbers)
    progress("saving")
    return Exported(write_bundle(output, manifest, parts, *keys), recipe, checks, refused, tuple(findings))


def _refuse(findings: Sequence[Finding]) -> None:
    if findings:
        raise GateError(f"{' '.join(f.message for f in findings)} Nothing was saved, because of --strict.", code="doubtful")


def _checked(
    recipe: Recipe,
    target: TargetProfile,
    evidence: Evidence,
    answers: dict[str, F32],
    options: Options,
    held_out: HeldOut | None,
    statistics: Statistics | None,
) -> tuple[Artefact, dict[str, float], list[Finding]]:
    """One target's files, check numbers and findings. `answers` are the logits by target of those that passed; this one's are
    added."""
    runtime = runtime_of(target)
    artefact = write(target, recipe.model)
    numbers, logits = run_checks(target, artefact, recipe.model, evidence, lambda states: fresh_export(recipe, states, target))
    if statistics is not None:
        numbers |= check_statistics(target.name, runtime, artefact, recipe.model, statistics, evidence.x, evidence.float_logits)
    findings = [*lost_channels(target.name, logits, evidence.float_logits)]
    if held_out is not None:
        measured, more = held_out.measure(
            target.name, lambda x: runtime.logits(artefact, recipe.model, x), options.min_agreement
        )
        numbers, logits = numbers | measured, np.concatenate([logits, more])
    other = next((name for name in answers if TARGETS[name].runtime != target.runtime), None)
    if other is not None:
        least = min(runtime_of(t).tolerance.same for t in (target, TARGETS[other]))
        agreed = agree(target.name, logits, other, answers[other], evidence.step, least, accepted=options.accept_difference)
        numbers |= agreed
        findings += differing(target.name, other, agreed, len(logits), least)
    answers[target.name] = logits
    return artefact, numbers, findings


def _calibration_part(pictures: Pictures) -> bytes:
    out = io.BytesIO()
    arrays: dict[str, np.ndarray] = {"images": pictures.images[:MOST_PICTURES]}
    if pictures.labels is not None:
        arrays["labels"] = pictures.labels[:MOST_PICTURES]
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def _manifest(
    recipe: Recipe, preprocess: Preprocess, options: Options, classes: int, noise: Mapping[str, float]
) -> pb.Manifest:
    m = pb.Manifest(
        name=options.name, made_by=f"refold {__version__}", created_unix_ms=int(time.time() * 1000), input_name="input",
        output_name="logits", class_count=classes, student="student.pt2", calibration="calibration.npz",
    )  # fmt: skip
    m.classes.extend(options.classes)
    m.preprocess.CopyFrom(preprocess.to_pb())
    m.norms.CopyFrom(table_to_pb(recipe.model.table))
    model = recipe.model
    for node in model.graph.nodes:
        site = model.sites.get(node.output)
        common = {
            "name": node.name,
            "site": site.name if site is not None and site.has_norm else "",
            "signal_to_noise": noise[node.output],
        }
        if node.output in model.weights:
            op = _layer_op(model, node.op, node.output)
            codes = model.weights[node.output]
            size = packed_size(codes.codes.size, codes.bits)
            m.layers.add(op=op, weight_bits=codes.bits, weight_bytes=size, runs_in="int8", **common)
        elif model.placement.roles[node.output] is Role.FLOAT and node.op not in BEHIND_A_NORM:
            kept = node.attributes.get("float_reason", "kept so by --keep-float")
            reason = kept if node.attributes.get("keep_float") else OPERATORS[node.op].reason
            held = node.parameters.values()
            stored = [p for p in held if p in model.stored]
            size = sum(model.stored[p].codes.nbytes if p in stored else model.graph.constants[p].nbytes for p in held)
            if stored:
                reason = "its weights have more than 8 bits; they are stored as 16-bit integers"
            bits = 16 if stored else 32 if size else 0
            m.layers.add(op=node.op, weight_bits=bits, weight_bytes=size, runs_in=f"float: {reason}", **common)
    return m


def _layer_op(model: IntegerModel, op: str, output: str) -> str:
    node = model.graph.producers()[output]
    if op == "conv" and node.attributes["groups"] > 1:
        depthwise = model.weights[output].codes.shape[1] == 1
        return "depthwise conv" if depthwise else "grouped conv"
    return op
