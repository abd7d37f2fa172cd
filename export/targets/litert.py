"""TFLite files for LiteRT: `model.tflite`, and `taps.tflite` whose output is the moments of every norm's output.

    model.tflite   in:  `input`, int8 codes of the picture (1, H, W, 3), where the first layer runs in integers; else float32
                   out: `logits`, float32 (1, classes)
    taps.tflite    in:  the same;  out: `moments`, float32 (1, 2, channels)

Both always hold the exported norms: a device patches other ones into a copy (`refold.tflite`), so a file with the values of a
state inside and the exported file patched to that state are the same bytes.
"""

from __future__ import annotations

import torch

from export.frontend.faults import blamed
from export.interpret import float_parameters, run
from export.ir import Graph, Node
from export.operators import Role
from export.quantise import IntegerModel
from export.targets import Artefact, TargetProfile, register_writer
from export.targets.litert_builder import LiteRtBuilder, Order, channels_last
from export.targets.litert_float import FLOAT
from export.targets.litert_moves import MOVES, codes_side, float_side
from export.targets.litert_ops import INTEGER, clamped, emit_integer_layer, emit_logits, float_layer
from refold.errors import ModelError

__all__ = ["INPUT", "LOGITS", "MOMENTS", "write_litert"]

INPUT, LOGITS, MOMENTS = "input", "logits", "moments"


@register_writer("litert")
def write_litert(profile: TargetProfile, model: IntegerModel, embedded: bool) -> Artefact:
    """Raises ModelError naming the layer and the operator that cannot be written."""
    sizes = _sizes(model.graph)
    engine = _Writer(profile, model, sizes, embedded=embedded)
    engine.write_all()
    taps = b""
    if any(s.kind.has_statistics for s in model.table.norms):
        taps = _Writer(profile, model, sizes, embedded=embedded, tapped=True).moments()
    fused = tuple(n.name for n in model.graph.nodes if n.output in model.weights)
    return Artefact(engine.logits(), taps, fused, engine.b.packed)


def _sizes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Every value's shape for one picture: shapes with the batch multiplied into another axis cannot be told otherwise."""
    found: dict[str, tuple[int, ...]] = {}

    def note(value: str, x: torch.Tensor) -> torch.Tensor:
        found[value] = tuple(x.shape)
        return x

    with torch.no_grad():
        run(graph, torch.zeros(1, *graph.shapes[graph.input][1:]), float_parameters(graph), note)
    return found


class _Writer:
    """One file. `tapped`: norms are left in float before their activation, and noted."""

    def __init__(
        self,
        profile: TargetProfile,
        model: IntegerModel,
        sizes: dict[str, tuple[int, ...]],
        *,
        embedded: bool,
        tapped: bool = False,
    ) -> None:
        self.profile, self.model, self.tapped = profile, model, tapped
        self.b = LiteRtBuilder(model, sizes, embedded=embedded)
        self.noted: list[tuple[int, Order, int]] = []
        value, order = model.graph.input, channels_last(4)
        shape = self.b.stored(value, order)
        codes = self.b.quantised(value)
        self.input = self.b.code_tensor(value, INPUT, shape) if codes else self.b.tensor(INPUT, shape)
        self.b.put(value, "codes" if codes else "raw", self.input, order)

    def write_all(self) -> None:
        for node in self.model.graph.nodes:
            with blamed(f"Writing layer {node.name} ({node.op})"):
                form, tensor, order = self._emit(node)
                self.b.put(node.output, form, self.b.narrowed(node.output, tensor) if form == "codes" else tensor, order)

    def _emit(self, node: Node) -> tuple[str, int, Order]:
        b, role = self.b, self.model.placement.roles[node.output]
        if role is Role.CODES:
            return "codes", *self._codes(node)
        if node.output in self.model.weights and not self._taps(node):
            if not b.quantised(node.output):
                tensor, order = emit_logits(b, node)
                return "raw", clamped(b, node, tensor), order
            return "codes", *emit_integer_layer(b, node)
        if role is Role.INTEGER and not self._taps(node) and node.op in INTEGER and node.op in self.profile.integer_operators:
            return "codes", *INTEGER[node.op](b, node)
        tensor, order = self._float(node)
        if self._taps(node):
            self.noted.append((tensor, order, b.model.sites[node.output].channels))
        return "raw", clamped(b, node, tensor), order

    def _taps(self, node: Node) -> bool:
        site = self.model.sites.get(node.output)
        return self.tapped and site is not None and site.has_norm and site.kind.has_statistics

    def _codes(self, node: Node) -> tuple[int, Order]:
        if node.op == "clamp":
            order = self.b.order(node.inputs[0])
            out = self.b.code_tensor(node.output, node.name, self.b.stored(node.output, order))
            self.b.operator("RELU", [self.b.codes(node.inputs[0])], out)
            return out, order
        return MOVES[node.op](self.b, node, codes_side(self.b, node))

    def _float(self, node: Node) -> tuple[int, Order]:
        if node.output in self.model.weights:
            return float_layer(self.b, node, float_side(self.b, node))
        if node.op in MOVES:
            return MOVES[node.op](self.b, node, float_side(self.b, node))
        if node.op not in FLOAT:
            raise ModelError(f"Layer {node.name} is a {node.op}, which Refold cannot write for LiteRT.", code="operator")
        return FLOAT[node.op](self.b, node)

    def logits(self) -> bytes:
        output = self.model.graph.output
        return self.b.finished([self.input], self.b.real(output, (0, 1)), LOGITS)

    def moments(self) -> bytes:
        """Mean and mean square over space of every noted tensor, all channels in a row: (1, 2, channels)."""
        self.write_all()
        b, rows = self.b, []
        for kind in ("mean", "square"):
            parts = []
            for tensor, order, channels in self.noted:
                source = tensor
                if kind == "square":
                    source = b.float_operator("MUL", [tensor, tensor], "squared", b.shape(tensor))
                if len(order) > 2:
                    axes = [i for i, axis in enumerate(order) if axis > 1]
                    source = b.float_operator("MEAN", [source, b.integers(*axes)], f"tap.{kind}", (1, channels))
                parts.append(source)
            total = sum(channels for _, _, channels in self.noted)
            row = b.float_operator("CONCATENATION", parts, kind, (1, total), axis=1) if len(parts) > 1 else parts[0]
            rows.append(b.float_operator("RESHAPE", [row, b.integers(1, 1, total)], f"{kind}.row", (1, 1, total)))
        both = b.float_operator("CONCATENATION", rows, MOMENTS, (1, 2, total), axis=1)
        return b.finished([self.input], both, MOMENTS)
