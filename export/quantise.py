"""Float graph → integers and norm sites: weights quantised before folding, one scale for each output channel, symmetric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from export.bits import EIGHT, BitPlan
from export.interpret import Parameters
from export.ir import Graph, Node
from export.placement import Placement, is_integer_layer
from export.scales import LEVELS, Scale
from refold.errors import ModelError
from refold.norms import ActivationScale, NormKind, NormSite, NormState, NormTable, SiteTensors

__all__ = ["IntegerModel", "StoredWeight", "WeightCodes", "code_limit", "integer_model", "quantise_weights"]

F32 = NDArray[np.float32]
CLIPPED_BELOW = 7  # bits
EXPLICIT = {
    "batch_norm": NormKind.BATCH,
    "layer_norm": NormKind.LAYER,
    "group_norm": NormKind.GROUP,
    "rms_norm": NormKind.RMS,
}


@dataclass(frozen=True)
class WeightCodes:
    """W ≈ scale[c] * codes[c]; int8. Scale 0 where a whole channel is zero.

    The codes are those of the unfolded weights; the sign of a folded norm is multiplied in by `signed`. Codes of an asymmetric
    form have their zero point subtracted: no runtime here takes one for weights (quant.md §4.1).

    Attributes:
        bits: a channel's codes take at most 2**bits values.
    """

    codes: NDArray[np.int8]
    scale: F32
    bits: int = 8

    def signed(self, sign: NDArray[np.int8]) -> NDArray[np.int8]:
        return np.asarray(self.codes * sign.reshape(-1, *[1] * (self.codes.ndim - 1)), np.int8)

    def dequantised(self) -> F32:
        return np.asarray(self.codes * self.scale.reshape(-1, *[1] * (self.codes.ndim - 1)), np.float32)


def code_limit(bits: int, qmax: int) -> int:
    """The largest code of a symmetric, narrow-range form on a target whose kernels take codes up to qmax."""
    return min((1 << bits - 1) - 1, qmax)


def quantise_weights(weight: F32, bits: int, qmax: int) -> WeightCodes:
    """Per output channel (axis 0), symmetric, narrow range.

    From 6 bits down every channel is clipped where its squared error is least: rounding then costs more than a clipped weight.
    """
    limit = code_limit(bits, qmax)
    flat = np.abs(weight.reshape(weight.shape[0], -1))
    reach = flat.max(1).astype(np.float64)
    if bits < CLIPPED_BELOW:
        reach = _best_reach(flat, reach, limit)
    scale = (reach / limit).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    codes = np.clip(np.rint(weight / safe), -limit, limit).astype(np.int8)
    return WeightCodes(codes, scale, 7 if bits == 8 and limit <= 64 else bits)


def _best_reach(flat: F32, reach: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    least, best = np.full(len(flat), np.inf), reach
    for share in np.linspace(1.0, 0.3, 36):
        step = np.maximum(reach * share / limit, 1e-30)[:, None]
        error = ((np.minimum(np.rint(flat / step), limit) * step - flat) ** 2).sum(1)
        best = np.where(error < least, reach * share, best)
        least = np.minimum(error, least)
    return best


@dataclass(frozen=True)
class StoredWeight:
    """Weights of a float layer, stored as 16-bit integers: W = step * codes, exactly."""

    codes: NDArray[np.int16]
    step: float


@dataclass(frozen=True)
class IntegerModel:
    """Everything a writer needs: the graph, where it runs, the integers by layer output, and the norm table.

    `table` is in execution order; `sites` maps a node's output to its site; `levels` has the values with fewer than 256 codes.
    `peak` is the largest |logit| calibration saw: a runtime whose last layer cannot leave float logits makes a scale of it.
    `stored` holds weights of float layers that a training left on a 16-bit grid, by the constant's name.
    """

    graph: Graph
    placement: Placement
    weights: Mapping[str, WeightCodes]
    table: NormTable
    sites: Mapping[str, NormSite]
    qmax: int
    levels: Mapping[str, int] = field(default_factory=dict)
    peak: float = 1.0
    stored: Mapping[str, StoredWeight] = field(default_factory=dict)

    def codes(self, node: Node) -> NDArray[np.int8]:
        """The integers that ship: sign included."""
        return self.weights[node.output].signed(self.sites[node.output].sign)

    @property
    def bits(self) -> int:
        """Of the widest layer."""
        return max(w.bits for w in self.weights.values())

    def scale_of(self, value: str) -> Scale:
        """The exported scale of a value that has one of its own."""
        found = next(a for a in self.table.activations if a.tensor == value)
        return Scale(found.scale, found.zero_point, self.levels.get(value, LEVELS))


def quantised_weights(graph: Graph, placement: Placement, qmax: int, plan: BitPlan = EIGHT) -> dict[str, WeightCodes]:
    bits = plan.weight_bits(graph, placement)
    return {
        n.output: quantise_weights(graph.constants[n.parameters["weight"]], bits[n.output], qmax)
        for n in graph.nodes
        if is_integer_layer(placement, n)
    }


def dequantised_parameters(graph: Graph, weights: Mapping[str, WeightCodes]) -> Parameters:
    """Parameters with the weights as an integer engine sees them."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in graph.constants.items()}
    rounded = {output: torch.from_numpy(w.dequantised()) for output, w in weights.items()}

    def of(node: Node) -> dict[str, torch.Tensor]:
        found = {role: tensors[name] for role, name in node.parameters.items()}
        if node.output in rounded:
            found["weight"] = rounded[node.output]
        return found

    return of


def integer_model(
    graph: Graph,
    placement: Placement,
    weights: Mapping[str, WeightCodes],
    scales: Mapping[str, Scale],
    qmax: int,
    floors: Mapping[str, NormSite] | None = None,
    peak: float = 1.0,
    power_of_two: bool = False,
) -> IntegerModel:
    """Puts the norm table together.

    Args:
        scales: of the values with a scale of their own.
        floors: sites of the bundle a fresh export is compared with; its dead channels keep that bundle's floors and signs,
            which, like the activation scales, are numbers of the calibration and not of the norm state.
        peak: largest |logit| of the float model on the calibration pictures.
        power_of_two: round the folded scales, now and at every refolding, to powers of two.

    Raises:
        ModelError: two layers share a norm, or the model has none.
    """
    sites: dict[str, NormSite] = {}
    norms: dict[str, str] = {}
    for node in graph.nodes:
        site = _site(graph, placement, node, weights, scales, power_of_two)
        if site is None:
            continue
        if site.has_norm and node.parameters["gamma"] in norms:
            raise ModelError(
                f"The norm {norms[node.parameters['gamma']]} is used twice: its statistics cannot follow two places at once. "
                "Give each place its own.",
                code="shared-norm",
            )
        if site.has_norm:
            norms[node.parameters["gamma"]] = site.name
        sites[node.output] = _with_floor(site, floors[site.name]) if floors else site
    activations = tuple(
        ActivationScale(v, scales[v].scale, scales[v].zero_point, f"{v}.scale", f"{v}.zero_point") for v in placement.scaled
    )
    table = NormTable(tuple(sites.values()), activations)
    if not table.norms:
        raise ModelError(
            "The model has no norm layer (BatchNorm, LayerNorm, GroupNorm, RMSNorm): nothing in it could adapt on a device.",
            code="no-norm",
        )
    levels = {v: scales[v].levels for v in placement.scaled if scales[v].levels != LEVELS}
    return IntegerModel(graph, placement, weights, table, sites, qmax, levels, peak)


def _with_floor(site: NormSite, known: NormSite) -> NormSite:
    if site.kind is not NormKind.FOLDED:
        return site
    a = np.abs(site.exported.gamma) / np.sqrt(site.exported.variance.astype(np.float64) + site.epsilon)
    dead = site.weight_scale * a <= known.scale_floor
    return replace(site, scale_floor=known.scale_floor, sign=np.where(dead, known.sign, site.sign).astype(np.int8))


def _site(
    graph: Graph, placement: Placement, node: Node, weights: Mapping[str, WeightCodes], scales: Mapping[str, Scale],
    power_of_two: bool,
) -> NormSite | None:  # fmt: skip
    held = {role: graph.constants[name] for role, name in node.parameters.items()}
    if is_integer_layer(placement, node):
        channels = held["weight"].shape[0]
        normed = "gamma" in held
        one, zero = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        source = placement.scale_of[node.inputs[0]]
        return NormSite.folded(
            node.site if normed else node.name,
            weight_scale=weights[node.output].scale,
            layer_bias=held.get("bias", zero),
            exported=_state(held) if normed else NormState(one, zero, zero, one),
            input_tensor=source,
            input_scale=scales[source].scale,
            epsilon=node.attributes["epsilon"] if normed else 0.0,
            has_norm=normed,
            power_of_two=power_of_two,
        )
    if node.op in EXPLICIT and node.site:
        kind = EXPLICIT[node.op]
        tensors = SiteTensors(multiply=f"{node.site}.multiply", add="" if kind is NormKind.RMS else f"{node.site}.add")
        return NormSite(node.site, kind, _state(held), float(node.attributes["epsilon"]), tensors=tensors)
    return None


def _state(held: Mapping[str, F32]) -> NormState:
    empty = np.zeros(0, np.float32)
    return NormState(held["gamma"], held.get("beta", empty), held.get("mean", empty), held.get("variance", empty))
