"""`refold export`, told from end to end:

    load_model ─► capture ─► rules ─► place ─► quantise weights ─► calibrate ─► integer_model
                                                                                    │
                     write_bundle ◄─ run_checks ◄─ student_program ◄─ target writers ◄┘

Nothing is written to disk before every check has passed.
"""

from __future__ import annotations

import fnmatch
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from export.calibrate import Calibration, calibrate
from export.capture import capture
from export.checks import Evidence, run_checks
from export.interpret import Parameters
from export.ir import Graph
from export.operators import OPERATORS, Role
from export.pictures import Pictures
from export.placement import Placement, place
from export.quantise import IntegerModel, dequantised_parameters, integer_model, quantised_weights
from export.rules import apply_rules
from export.scales import Scale
from export.student import student_program
from export.targets import Artefact, TargetConfig, target_named, write
from refold import __version__
from refold.bundle import Bundle, write_bundle
from refold.codec import table_to_pb
from refold.errors import ModelError, UsageError
from refold.norms import NormSite, NormState
from refold.preprocess import Preprocess
from refold.signing import SigningKey
from refold.v1 import manifest_pb2 as pb

__all__ = ["MOST_PICTURES", "Exported", "Options", "Recipe", "export_model", "fresh_export", "make_recipe"]

Progress = Callable[[str], None]
BEHIND_A_NORM = ("clamp", "reshape", "transpose", "slice", "pad", "max_pool", "expand_constant", "upsample_nearest")
MOST_PICTURES = 2048  # in a bundle: 6 MB of 32x32; the device compares its frames with them, the cloud restyles them


@dataclass(frozen=True)
class Options:
    """What a person may choose.

    Attributes:
        targets: names of `export.targets.TARGETS`; one set of integers serves all: the narrowest sets the weight codes.
        observer: auto, minmax, percentile or entropy.
        keep_float: globs of layer names that stay in float.
        min_agreement: share of calibration pictures on which the engine must choose the float model's class.
    """

    targets: Sequence[str] = ("ort-x86-avx2",)
    name: str = "model"
    classes: Sequence[str] = ()
    observer: str = "auto"
    keep_float: Sequence[str] = ()
    min_agreement: float = 0.9


@dataclass(frozen=True)
class Recipe:
    """All that an export depends on besides the norm states: the captured float graph and what calibration fixed.

    Attributes:
        graph: as captured, norms apart, weights in float.
        model: the integer model at the exported state.
    """

    graph: Graph
    scales: Mapping[str, Scale]
    qmax: int
    targets: tuple[TargetConfig, ...]
    model: IntegerModel
    calibration: Calibration


@dataclass(frozen=True)
class Exported:
    """A finished export: the bundle on disk, the recipe for fresh exports, and each target's check numbers."""

    bundle: Bundle
    recipe: Recipe
    checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def make_recipe(
    model: nn.Module | ExportedProgram,
    preprocess: Preprocess,
    pictures: Pictures,
    options: Options = Options(),
    progress: Progress = lambda what: None,
) -> Recipe:
    """Captures, calibrates and quantises; writes nothing.

    Raises:
        ModelError, InputError: see `export.capture`, `export.calibrate` and `export.quantise`.
    """  # fmt: skip
    if not options.targets:
        raise UsageError("Name at least one --target.")
    targets = tuple(target_named(t) for t in dict.fromkeys(options.targets))
    progress("capturing the model")
    captured = _marked(capture(model, preprocess.height, preprocess.width), options.keep_float)
    graph, placement = _prepared(captured)
    qmax = min(t.qmax for t in targets)
    weights = quantised_weights(graph, placement, qmax)
    if not weights:
        raise ModelError("The model has no convolution or linear layer that can run in integers.", code="no-layers")

    def quantised(scales: Mapping[str, Scale]) -> Parameters:
        return dequantised_parameters(graph, weights)

    # Refuses a model without norms before minutes of calibration.
    integer_model(graph, placement, weights, dict.fromkeys(placement.scaled, Scale(1.0, 0)), qmax)
    calibration = calibrate(
        graph,
        placement,
        preprocess.apply(pictures.images),
        quantised,
        options.observer,
        lambda w: progress(f"calibrating: {w}"),
    )
    integers = integer_model(graph, placement, weights, calibration.scales, qmax)
    return Recipe(captured, calibration.scales, qmax, targets, integers, calibration)


def _prepared(captured: Graph) -> tuple[Graph, Placement]:
    graph = apply_rules(captured)
    return graph, place(graph)


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
    recipe: Recipe, states: Mapping[str, NormState], target: TargetConfig | None = None
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
    graph, placement = _prepared(captured)
    anchors: dict[str, NormSite] = {s.name: s for s in recipe.model.table.sites}
    weights = quantised_weights(graph, placement, recipe.qmax)
    model = integer_model(graph, placement, weights, recipe.scales, recipe.qmax, anchors)
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
) -> Exported:
    """Exports a model into `output`.

    Args:
        model: in evaluation mode, with its weights.
        pictures: calibration; at most `MOST_PICTURES` of them go into the bundle.

    Raises:
        ModelError, InputError, UsageError: the model or the pictures cannot be used.
        GateError: a self-check failed; nothing was written.
        StorageError: the disk is full or not writable.
    """  # fmt: skip
    if not output.parent.is_dir():
        raise UsageError(f"There is no directory {output.parent} to write {output.name} into.")
    recipe = make_recipe(model, preprocess, pictures, options, progress)
    classes = recipe.model.graph.shapes[recipe.model.graph.output][-1]
    if options.classes and len(options.classes) != classes:
        raise UsageError(f"--classes names {len(options.classes)} classes; the model has {classes} outputs.")
    progress("writing the student")
    student = student_program(recipe.model)
    manifest = _manifest(recipe, preprocess, options, classes)
    parts = {manifest.student: student, manifest.calibration: _calibration_part(pictures)}
    evidence = Evidence(
        preprocess.apply(pictures.images), pictures.labels, recipe.calibration.float_logits, options.min_agreement
    )
    checks = {}
    for target in recipe.targets:
        progress(f"writing and checking {target.name}")
        artefact = write(target, recipe.model)

        def fresh(states: Mapping[str, NormState], target: TargetConfig = target) -> tuple[Artefact, IntegerModel]:
            return fresh_export(recipe, states, target)

        checks[target.name] = run_checks(target.name, artefact, recipe.model, student, evidence, fresh)
        entry = manifest.targets.add(name=target.name, weight_bits=recipe.model.bits, updatable=True)
        entry.model = f"targets/{target.name}/model.onnx"
        parts[entry.model] = artefact.model
        if artefact.taps:
            entry.taps = f"targets/{target.name}/taps.onnx"
            parts[entry.taps] = artefact.taps
        for name, value in checks[target.name].items():
            entry.checks[name] = value
    progress("saving")
    return Exported(write_bundle(output, manifest, parts, *keys), recipe, checks)


def _calibration_part(pictures: Pictures) -> bytes:
    out = io.BytesIO()
    arrays: dict[str, np.ndarray] = {"images": pictures.images[:MOST_PICTURES]}
    if pictures.labels is not None:
        arrays["labels"] = pictures.labels[:MOST_PICTURES]
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def _manifest(recipe: Recipe, preprocess: Preprocess, options: Options, classes: int) -> pb.Manifest:
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
        common = {"name": node.name, "site": site.name if site is not None and site.has_norm else ""}
        if node.output in model.weights:
            op = _layer_op(model, node.op, node.output)
            size = model.weights[node.output].codes.size
            m.layers.add(op=op, weight_bits=model.bits, weight_bytes=size, runs_in="int8", **common)
        elif model.placement.roles[node.output] is Role.FLOAT and node.op not in BEHIND_A_NORM:
            reason = "kept so by --keep-float" if node.attributes.get("keep_float") else OPERATORS[node.op].reason
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
