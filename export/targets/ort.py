"""QDQ ONNX for ONNX Runtime: `model.onnx`, and `taps.onnx` whose output is the moments of every norm's output."""

from __future__ import annotations

from export.frontend.faults import blamed
from export.ir import Node
from export.operators import Role
from export.quantise import IntegerModel
from export.targets import Artefact, TargetProfile, register_writer
from export.targets.onnx_builder import OnnxBuilder
from export.targets.onnx_ops import EMITTERS, emit_codes, emit_integer_layer

__all__ = ["INPUT", "LOGITS", "MOMENTS", "emit_moments", "write_ort"]

INPUT, LOGITS, MOMENTS = "input", "logits", "moments"


@register_writer("ort")
def write_ort(profile: TargetProfile, model: IntegerModel, embedded: bool) -> Artefact:
    """Both graphs hold the same integers and name the same adaptable tensors."""
    engine = OnnxBuilder(model, embedded=embedded)
    _emit_all(engine)
    engine.node("Identity", [engine.real(model.graph.output)], LOGITS)
    classes = model.graph.shapes[model.graph.output][-1]
    taps = b""
    if any(s.kind.has_statistics for s in model.table.norms):
        builder = OnnxBuilder(model, embedded=embedded)
        taps = emit_moments(builder, _emit_all(builder))
    fused = tuple(n.name for n in model.graph.nodes if n.output in model.weights)
    return Artefact(engine.finished(LOGITS, [engine.pictures, classes]), taps, fused, engine.packed)


def _emit_all(b: OnnxBuilder) -> list[tuple[Node, str]]:
    """Writes every node; returns the norms with statistics, and the float tensor each leaves before its activation."""
    tapped = []
    for node in b.graph.nodes:
        with blamed(f"Writing layer {node.name} ({node.op})"):
            if b.model.placement.roles[node.output] is Role.CODES:
                emit_codes(b, node)
                continue
            before = f"{node.output}.y" if node.activation is not None else node.output
            if node.output in b.model.weights:
                emit_integer_layer(b, node, before)
            else:
                EMITTERS[node.op](b, node, [b.real(v) for v in node.inputs], before)
            if node.activation is not None:
                b.clamped(node, before, node.output)
        site = b.model.sites.get(node.output)
        if site is not None and site.has_norm and site.kind.has_statistics:
            tapped.append((node, before))
    return tapped


def emit_moments(b: OnnxBuilder, tapped: list[tuple[Node, str]]) -> bytes:
    """Mean and mean square over space of every tapped tensor, all channels in a row: (batch, 2, channels)."""
    rows: dict[str, list[str]] = {"mean": [], "square": []}
    column = b.integers("moments.column", 0, -1, 1, 1)
    for node, value in tapped:
        square = b.node("Mul", [value, value], f"{value}.squared")
        for kind, source in (("mean", value), ("square", square)):
            rank = len(b.graph.shapes[node.output])
            pooled = source if rank == 2 else b.node("GlobalAveragePool", [source], f"{value}.{kind}.pooled")
            rows[kind].append(pooled if rank == 4 else b.node("Reshape", [pooled, column], f"{value}.{kind}"))
    channels = sum(b.model.sites[n.output].channels for n, _ in tapped)
    shape = b.integers("moments.shape", -1, 1, channels)
    both = [
        b.node("Reshape", [b.node("Concat", parts, f"all.{kind}", axis=1), shape], f"moments.{kind}")
        for kind, parts in rows.items()
    ]
    b.node("Concat", both, MOMENTS, axis=1)
    return b.finished(MOMENTS, [b.pictures, 2, channels])
