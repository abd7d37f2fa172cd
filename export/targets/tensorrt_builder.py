"""The ONNX graph a TensorRT engine is built from: pairs of Q and DQ around floats, norms as nodes of their own, one shape.

x ─ Q ─ DQ ─► Conv ─► BatchNormalization ─► Relu ─ Q ─ DQ ─►      W int8 ─ DQ ─► Conv
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from export.interpret import float_parameters, run
from export.ir import Graph, Node
from export.quantise import IntegerModel
from export.targets.onnx_builder import OnnxBuilder
from refold.norms import NormKind
from refold.tensorrt import RefitSite, file_tensors, symmetric

__all__ = ["PICTURES", "TensorRtBuilder"]

PICTURES = 1  # in a batch; a camera gives one at a time


def _sizes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Every value's shape for `PICTURES` pictures: with the batch multiplied into another axis it cannot be told otherwise."""
    found: dict[str, tuple[int, ...]] = {}

    def note(value: str, x: torch.Tensor) -> torch.Tensor:
        found[value] = tuple(x.shape)
        return x

    with torch.no_grad():
        run(graph, torch.zeros(PICTURES, *graph.shapes[graph.input][1:]), float_parameters(graph), note)
    return found


class TensorRtBuilder(OnnxBuilder):
    """Everything is inside the file: TensorRT reads it whole, and a device patches nothing into it but scales."""

    pictures = PICTURES

    def __init__(self, model: IntegerModel) -> None:
        self._activations = {a.tensor: a for a in model.table.activations}
        self._integer_layers = {n.name for n in model.graph.nodes if n.output in model.weights}
        super().__init__(model, embedded=True)
        self.sizes = _sizes(model.graph)

    def adaptable(self) -> dict[str, NDArray[np.generic]]:
        """Symmetric activation scales with their zero points, which are 0, and the norms as the file holds them."""
        found: dict[str, NDArray[np.generic]] = {}
        for activation in self.model.table.activations:
            scale, _ = symmetric(activation, self.model.levels.get(activation.tensor, 256))
            found[f"{activation.tensor}.scale"] = np.asarray(scale)
            found[f"{activation.tensor}.zero_point"] = np.asarray(0, np.int8)
        ranks = {site.name: len(self.graph.shapes[value]) for value, site in self.model.sites.items()}
        for site in self.model.table.norms:
            for name, value in file_tensors(site, site.exported).items():
                spread = [1] * (ranks[site.name] - 2) if site.kind is NormKind.GROUP else []
                found[name] = value.reshape(-1, *spread)
        return found

    def _node_name(self, layer: str, op: str, output: str) -> str:
        """TensorRT changes names that repeat. Integer layers keep theirs, every other node gives way."""
        name = layer or output
        taken = (
            name in self._integer_layers or name in self._named or (not layer and self._layers.get(output, output) != output)
        )
        return super()._node_name(f"{op}/{output}" if taken and op not in ("Conv", "Gemm") else name, op, output)

    def codes(self, value: str) -> str:
        """Name of a quantised value's int8 codes. Where its codes end before int8 does, a clamp stands in front."""
        source = value
        activation = self._activations.get(value)
        if activation is not None:
            _, clamp = symmetric(activation, self.model.levels.get(value, 256))
            if clamp is not None:
                bounds = [self.constant(f"{value}.{end}", b) for end, b in zip(("low", "high"), clamp, strict=True)]
                source = self.node("Clip", [value, *bounds], f"{value}.clipped")
        return self.node("QuantizeLinear", [source, *self.scale(value)], f"{value}.q")

    def dequantised_weight(self, node: Node) -> str:
        """An integer layer's weights: int8 codes of the unfolded weights, without a sign, and a positive scale per channel."""
        held = self.model.weights[node.output]
        codes = self.constant(f"{node.name}.codes", held.codes, np.int8)
        positive = np.where(held.scale > 0, held.scale, 1)  # a channel of zeros has scale 0, which TensorRT does not take
        scale = self.constant(f"{node.name}.codes.scale", positive)
        zero = self.constant(f"{node.name}.codes.zero_point", np.zeros(len(positive)), np.int8)
        return self.node("DequantizeLinear", [codes, scale, zero], f"{node.output}.w", axis=0)

    def batch_norm(self, node: Node, source: str, target: str) -> None:
        """The norm of a site with statistics, as a node with four named vectors."""
        site = self.model.sites[node.output]
        names = RefitSite.of(site)
        self.node("BatchNormalization", [source, *names.initialisers], target, name=names.node, epsilon=float(site.epsilon))

    def finished(self, output: str, shape: Sequence[int | str]) -> bytes:
        """Without what does not lead to the output: TensorRT would import it, and could not refit what it then throws away."""
        wanted, kept = {output}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in wanted}
        return super().finished(output, shape)
