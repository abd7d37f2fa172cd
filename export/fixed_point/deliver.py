"""From a trained network to what the exporter needs in place of calibration and rounding: codes, scales, trained constants.

    word of a layer and of its activations   becomes
    up to 8 bits                             an integer layer: int8 codes, scale 2**-FL for every channel, zero point 0
    9 to 16                                  a float layer whose weights are stored as int16 and one scale
    more                                     a float layer

Activations of up to 8 bits become unsigned codes with scale 2**-FL: zero point 2**(WL-1) where they are signed, else 0.

Targets whose kernels saturate (x86 without VNNI) take 7-bit codes: a tensor that uses more loses its last bit of fraction
there, rounded to nearest, half to even. Train with `longest=7` and nothing is lost.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from export.fixed_point.network import Network
from export.fixed_point.number import FixedPoint
from export.given import Given
from export.ir import Graph
from export.operators import Role
from export.placement import Placement, is_integer_layer, place
from export.quantise import IntegerModel, StoredWeight, WeightCodes, integer_model
from export.rules import apply_rules
from export.scales import Scale
from refold.errors import ModelError

__all__ = ["Delivery", "deliver", "sizes"]

INTEGER, STORED = 8, 16  # longest words of int8 layers, and of weights stored as int16


@dataclass(frozen=True)
class Delivery:
    """Attributes:
    captured: the float graph with the trained constants; layers that stay in float carry `keep_float`.
    graph, placement: the same after the rules.
    stored: weights of 9 to 16 bits, by constant's name.
    shortened: layers that lost a bit of fraction for the target, by name, with the root mean square of what it changed over
        that of the weights.
    keep_float: names of what must stay in float, for `export.pipeline.Options`.
    """

    captured: Graph
    graph: Graph
    placement: Placement
    given: Given
    stored: Mapping[str, StoredWeight]
    shortened: Mapping[str, float]
    qmax: int
    keep_float: tuple[str, ...]

    def integers(self, *, power_of_two: bool = False) -> IntegerModel:
        """What the target writers take.

        Args:
            power_of_two: round the folded scales, now and at every refolding, to powers of two.

        Raises:
            ModelError: see `export.quantise.integer_model`.
        """
        given = self.given
        model = integer_model(self.graph, self.placement, given.weights, given.scales, self.qmax, power_of_two=power_of_two)
        return replace(model, stored=self.stored)


def deliver(network: Network, qmax: int = 127) -> Delivery:
    """Args:
        qmax: largest magnitude of a weight code on the target: 64 where kernels saturate, else 127.

    Raises:
        ModelError: the network was trained in float32.
    """  # fmt: skip
    if network.settings.float32:
        raise ModelError("A network trained in float32 has no fixed-point codes to deliver.", code="float32")
    captured = network.captured.copy()
    constants = {n: v for n, v in network.constants().items() if n in captured.constants}
    captured.constants.update(constants)
    kept = _kept_in_float(network)
    captured.nodes = [n.with_attributes(keep_float=True) if n.name in kept else n for n in captured.nodes]
    graph = apply_rules(captured)
    placement = place(graph)
    weights, shortened = {}, {}
    for node in graph.nodes:
        if not is_integer_layer(placement, node):
            continue
        name = node.parameters["weight"]
        codes, form = _codes(captured.constants[name], network.forms[name], qmax)
        scale = np.full(codes.shape[0], form.step, np.float32)
        weights[node.output] = WeightCodes(codes.astype(np.int8), scale, form.word)
        if form != network.forms[name]:
            whole = captured.constants[name].astype(np.float64)
            apart = codes * form.step - whole
            shortened[node.name] = float(np.sqrt((apart**2).mean() / max((whole**2).mean(), 1e-30)))
    return Delivery(
        captured,
        graph,
        placement,
        Given(weights, _scales(network, placement), constants),
        _stored(network, graph, weights),
        shortened,
        qmax,
        kept,
    )


def _codes(weight: NDArray[np.float32], form: FixedPoint, qmax: int) -> tuple[NDArray[np.int64], FixedPoint]:
    codes = form.codes(weight)
    while np.abs(codes).max(initial=0) > qmax:
        form = FixedPoint(form.word - 1, form.fraction - 1, form.signed, form.narrow)
        codes = np.rint(weight.astype(np.float64) / form.step).astype(np.int64)
    return codes, form


def _kept_in_float(network: Network) -> tuple[str, ...]:
    """What no integer kernel takes: layers of long words, and whatever reads or makes a value of long words."""
    forms = {value: network.form_of_value(source) for value, source in network.placement.scale_of.items()}
    long_values = {value for value, form in forms.items() if form is not None and form.word > INTEGER}
    kept = []
    for node in network.graph.nodes:
        if network.placement.roles[node.output] is not Role.INTEGER:
            continue
        weight = node.parameters.get("weight", "")
        too_long = weight in network.forms and network.forms[weight].word > INTEGER
        if too_long or long_values.intersection((*node.inputs, node.output)):
            kept.append(node.name)
    return tuple(kept)


def _scales(network: Network, placement: Placement) -> dict[str, Scale]:
    """Scales of what is coded now. A value coded only since a neighbour became float has the format of what its codes were."""
    found = {}
    for value in placement.scaled:
        form = network.form_of_value(network.placement.scale_of.get(value, value))
        if form is None:
            raise ModelError(f"The activation {value} was never seen in training: train for one step at least.", code="unseen")
        found[value] = Scale(form.step, form.zero_point, 2**form.word)
    return found


def _stored(network: Network, graph: Graph, integer: Mapping[str, WeightCodes]) -> dict[str, StoredWeight]:
    stored = {}
    for node in graph.nodes:
        name = node.parameters.get("weight", "")
        form = network.forms.get(name)
        if form is not None and INTEGER < form.word <= STORED and node.output not in integer:
            stored[name] = StoredWeight(form.codes(graph.constants[name]).astype(np.int16), form.step)
    return stored


def sizes(delivery: Delivery) -> dict[str, int]:
    """Bytes of all weights: as float32 and as delivered, each plain and deflated as a bundle keeps them (zeros shrink)."""
    integer = {n.parameters["weight"]: delivery.given.weights[n.output].codes for n in delivery.graph.nodes
               if n.output in delivery.given.weights}  # fmt: skip
    names = list(dict.fromkeys(n.parameters["weight"] for n in delivery.graph.nodes if "weight" in n.parameters))
    full = {name: delivery.graph.constants[name].astype(np.float32).tobytes() for name in names}
    kept = {
        **full,
        **{n: w.codes.tobytes() for n, w in delivery.stored.items()},
        **{n: c.tobytes() for n, c in integer.items()},
    }
    return {
        "float32": sum(map(len, full.values())),
        "float32_deflated": sum(len(zlib.compress(b, 6)) for b in full.values()),
        "delivered": sum(map(len, kept.values())),
        "delivered_deflated": sum(len(zlib.compress(b, 6)) for b in kept.values()),
    }
