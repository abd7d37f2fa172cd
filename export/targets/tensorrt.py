"""ONNX for TensorRT: `model.onnx`, `taps.onnx` whose output is the moments of every norm's output, and `build.json`.

    model.onnx   in:  `input`, float32 (1, 3, H, W)      out: `logits`, float32 (1, classes)
    taps.onnx    in:  the same                            out: `moments`, float32 (1, 2, channels)
    build.json   how a device makes an engine of either, and which of its weights a release changes (`refold.tensorrt`)

Other targets fold a norm into integers of one sign, a scale and a bias (`refold.norms`). Here the integers are those of the
weights alone: `WeightCodes.codes`, not `WeightCodes.signed`. The two agree, code for code, but for the sign of channels whose
gamma is negative, which is in the norm's own scale here. TensorRT fuses convolution, norm, activation and quantisation itself
and keeps the norm's vectors apart, so that they can be exchanged: gamma may change its sign and its size as it likes.

TensorRT knows no zero points. An activation gets the symmetric scale that covers its range: one that starts at zero uses
0..127, half as fine as 0..255. Operators that move codes are written in float between a DQ and a Q of the same scale, which
give every code back; TensorRT draws the pair through them.
"""

from __future__ import annotations

from collections.abc import Callable

from export.frontend.faults import blamed
from export.ir import Node
from export.quantise import IntegerModel
from export.targets import Artefact, TargetProfile, register_writer
from export.targets.onnx_builder import OnnxBuilder
from export.targets.onnx_ops import EMITTERS
from export.targets.ort import LOGITS, MOMENTS, emit_moments
from export.targets.tensorrt_builder import TensorRtBuilder
from refold.tensorrt import RECIPE, recipe_of

__all__ = ["LOGITS", "MOMENTS", "write_tensorrt"]

Emitter = Callable[[TensorRtBuilder, Node, list[str], str], None]


@register_writer("tensorrt")
def write_tensorrt(profile: TargetProfile, model: IntegerModel, embedded: bool) -> Artefact:
    """Everything is embedded in any case; weights of few bits are int8 codes here, too."""
    engine = TensorRtBuilder(model)
    _emit_all(engine)
    engine.node("Identity", [engine.real(model.graph.output)], LOGITS)
    classes = model.graph.shapes[model.graph.output][-1]
    taps = b""
    if any(s.kind.has_statistics for s in model.table.norms):
        builder = TensorRtBuilder(model)
        taps = emit_moments(builder, _emit_all(builder))
    fused = tuple(n.name for n in model.graph.nodes if n.output in model.weights)
    recipe = recipe_of(model.table, dict(model.levels), len(fused))
    return Artefact(engine.finished(LOGITS, [engine.pictures, classes]), taps, fused, beside={RECIPE: recipe.to_json()})


def _emit_all(b: TensorRtBuilder) -> list[tuple[Node, str]]:
    """Writes every node; returns the norms with statistics, and the float tensor each leaves before its activation."""
    tapped = []
    for node in b.graph.nodes:
        before = f"{node.output}.y" if node.activation is not None else node.output
        with blamed(f"Writing layer {node.name} ({node.op})"):
            if node.output in b.model.weights:
                _emit_layer(b, node, before)
            else:
                OURS.get(node.op, _shared)(b, node, [b.real(v) for v in node.inputs], before)
            if node.activation is not None:
                b.clamped(node, before, node.output)
        site = b.model.sites.get(node.output)
        if site is not None and site.has_norm and site.kind.has_statistics:
            tapped.append((node, before))
    return tapped


def _emit_layer(b: TensorRtBuilder, node: Node, target: str) -> None:
    """conv or linear on dequantised codes and weights, with the layer's own bias; then its norm, if it has one."""
    normed = b.model.sites[node.output].has_norm
    inputs = [b.real(node.inputs[0]), b.dequantised_weight(node)]
    if "bias" in node.parameters:
        inputs.append(b.parameter(node, "bias"))
    layer = f"{node.output}.layer" if normed else target
    if node.op == "linear":
        b.node("Gemm", inputs, layer, transB=1, name=node.name)
    else:
        a = node.attributes
        kernel = list(b.graph.constants[node.parameters["weight"]].shape[2:])
        b.node("Conv", inputs, layer, name=node.name, kernel_shape=kernel, strides=a["strides"], pads=a["pads"],
               dilations=a["dilations"], group=a["groups"])  # fmt: skip
    if normed:
        b.batch_norm(node, layer, target)


def _shared(b: OnnxBuilder, node: Node, xs: list[str], target: str) -> None:
    EMITTERS[node.op](b, node, xs, target)


def _batch_norm(b: TensorRtBuilder, node: Node, xs: list[str], target: str) -> None:
    if node.output in b.model.sites:
        b.batch_norm(node, xs[0], target)
    else:
        _shared(b, node, xs, target)


def _group_norm(b: TensorRtBuilder, node: Node, xs: list[str], target: str) -> None:
    """Whitened by InstanceNormalization over rows of one group each; multiply and add as constants of their final shape."""
    size, groups = b.sizes[node.inputs[0]], node.attributes["groups"]
    if node.output not in b.model.sites:
        _shared(b, node, xs, target)
        return
    names = b.model.sites[node.output].tensors
    rows = b.node("Reshape", [*xs, b.integers(f"{target}.rows", size[0], groups, -1)], f"{target}.groups")
    one, zero = b.constant(f"ones.{groups}", [1.0] * groups), b.constant(f"zeros.{groups}", [0.0] * groups)
    even = b.node("InstanceNormalization", [rows, one, zero], f"{target}.even", epsilon=node.attributes["epsilon"],
                  name=node.name)  # fmt: skip
    back = b.node("Reshape", [even, b.integers(f"{target}.shape", *size)], f"{target}.normal")
    b.node("Add", [b.node("Mul", [back, names.multiply], f"{target}.scaled"), names.add], target)


def _reshape(b: TensorRtBuilder, node: Node, xs: list[str], target: str) -> None:
    b.node("Reshape", [*xs, b.integers(f"{target}.shape", *b.sizes[node.output])], target)


def _expand_constant(b: TensorRtBuilder, node: Node, xs: list[str], target: str) -> None:
    b.node("Expand", [b.parameter(node, "value"), b.integers(f"{target}.shape", *b.sizes[node.output])], target)


OURS: dict[str, Emitter] = {
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "reshape": _reshape,
    "expand_constant": _expand_constant,
}
