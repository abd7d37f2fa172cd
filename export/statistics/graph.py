"""Writes the statistics graph: one forward pass that measures every norm and applies what it found before the next is measured.

At a norm with input z, behind an integer layer z = sW xs acc + c0:

    observed   mean and variance of z over batch and space, joined with moments of images measured before
    served     `refold.statistics.posterior`, the same formulae in float32
    applied    ws = max(sW |a|, floor),  B = round((beta + (c0 - mean) a) / (xs ws)),  y = (acc + B) xs ws

with a = gamma / sqrt(variance + epsilon): the engine's own refolding (`refold.norms.refold`). y is quantised at the exported
scale, so the next layer sees what the engine would show it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

from export.frontend.faults import blamed
from export.ir import Node
from export.operators import Role
from export.quantise import IntegerModel
from export.targets.onnx_builder import IR_VERSION, OPSET, OnnxBuilder
from export.targets.onnx_ops import EMITTERS, emit_codes, emit_integer_layer
from refold.norms import NormKind, NormSite
from refold.statistics import INPUTS, OUTPUTS, RATIO, ROWS, Layout
from refold.statistics.contract import LEVELS

__all__ = ["statistics_graph"]


def statistics_graph(model: IntegerModel, groups: int) -> tuple[bytes, dict[str, NDArray[np.generic]]]:
    """The ONNX model described in `refold.statistics.contract`, of a model some of whose norms have statistics.

    Args:
        groups: K, of the class moments.

    Returns:
        (the model, its external initialisers as exported): tensors of the norm table that no statistic enters, packed integers.
    """
    builder = _StatisticsBuilder(model, groups)
    for node in model.graph.nodes:
        with blamed(f"Writing the statistics of layer {node.name} ({node.op})"):
            builder.emit(node)
    return builder.done(), builder.externals()


class _StatisticsBuilder(OnnxBuilder):
    """An `OnnxBuilder` whose norms with statistics are computed instead of given."""

    def __init__(self, model: IntegerModel, groups: int) -> None:
        super().__init__(model)
        self._layout, self._groups = Layout(model.table), groups
        self._places = {s.name: i for i, s in enumerate(self._layout.sites)}
        self._rows: dict[str, list[str]] = {}
        for site in self._layout.sites:  # computed here, so they are no initialisers
            t = site.tensors
            for name in (t.weight_scale, t.bias, t.bias_scale, t.multiply, t.add):
                self.tensors.pop(name, None)

    def emit(self, node: Node) -> None:
        """Writes one node of the graph."""
        if self.model.placement.roles[node.output] is Role.CODES:
            emit_codes(self, node)
            return
        before = f"{node.output}.y" if node.activation is not None else node.output
        site = self.model.sites.get(node.output)
        if site is not None and site.name in self._places:
            _Site(self, node, site, self._places[site.name]).emit(before)
        elif node.output in self.model.weights:
            emit_integer_layer(self, node, before)
        else:
            EMITTERS[node.op](self, node, [self.real(v) for v in node.inputs], before)
        if node.activation is not None:
            self.clamped(node, before, node.output)

    def picked(self, source: str, place: int, output: str) -> str:
        """One row of an input."""
        name = f"place.{place}"
        self.tensors.setdefault(name, numpy_helper.from_array(np.asarray(place, np.int64), name))
        return self.node("Gather", [source, name], output, axis=0)

    def measured(self, site: NormSite, mean: str, square: str, served_mean: str, served_variance: str) -> None:
        """Keeps the names of a site's rows of the output."""
        self._rows[site.name] = [mean, square, served_mean, served_variance]

    def externals(self) -> dict[str, NDArray[np.generic]]:
        """Values that are not in the file, by name."""
        values = self.adaptable() | {name: w.codes for name, w in self.packed.items()}
        return {name: v for name, v in values.items() if name in self.tensors}

    def done(self) -> bytes:
        """The model's bytes."""
        lead = self.integers("int.0", 0)
        rows = []
        for i, role in enumerate(OUTPUTS.rows):
            row = self.node("Concat", [self._rows[s.name][i] for s in self._layout.sites], f"all.{role}", axis=0)
            rows.append(self.node("Unsqueeze", [row, lead], f"all.{role}.row"))
        self.node("Concat", rows, OUTPUTS.moments, axis=0)
        self.node("Identity", [self.real(self.graph.output)], OUTPUTS.logits)
        channels, sites = self._layout.channels, len(self._layout.sites)
        inputs = [
            _value(self.graph.input, ["batch", *self.graph.shapes[self.graph.input][1:]]),
            _value(INPUTS.channels, [len(ROWS), channels]),
            _value(INPUTS.directions, [self._groups, channels]),
            _value(INPUTS.uncertainty, [sites, self._groups]),
            _value(INPUTS.variance_directions, [self._groups, channels]),
            _value(INPUTS.variance_uncertainty, [sites, self._groups]),
            _value(INPUTS.levels, [sites, len(LEVELS)]),
            _value(INPUTS.share, []),
        ]
        answers = [
            _value(OUTPUTS.moments, [len(OUTPUTS.rows), channels]),
            _value(OUTPUTS.logits, ["batch", self.graph.shapes[self.graph.output][-1]]),
        ]
        graph = helper.make_graph(self.nodes, "refold", inputs, answers, list(self.tensors.values()))
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        made.producer_name = "refold"
        return bytes(made.SerializeToString(deterministic=True))


class _Site:
    """The nodes of one norm."""

    def __init__(self, builder: _StatisticsBuilder, node: Node, site: NormSite, place: int) -> None:
        self.b, self.layer, self.site, self.place = builder, node, site, place
        self.out, self.rank = node.output, len(builder.graph.shapes[node.output])
        self.span = builder._layout.slices[place]

    def emit(self, target: str) -> None:
        if self.site.kind is NormKind.FOLDED:
            self._folded(target)
        else:
            self._explicit(target)

    def _folded(self, target: str) -> None:
        site, sums = self.site, self._sums()
        unit = self.b.scale(self.layer.inputs[0])[0]
        step = self._op("Mul", "step", self._held("weight_step", site.sign * site.weight_scale), unit)
        mean, variance = self._observed(sums)
        bias = self._held("layer_bias", site.layer_bias)
        mean = self._op("Add", "z.mean", self._op("Mul", "z.scaled", mean, step), bias)
        variance = self._op("Mul", "z.variance", variance, self._op("Mul", "step.squared", step, step))
        a, centre = self._served(mean, variance)
        size = self._op("Mul", "size", self._held("weight_scale", site.weight_scale), self._op("Abs", "a.size", a))
        if site.power_of_two:
            size, a = self._shifted(size, a)
        folded = self._op("Max", "folded", size, self._held("floor", site.scale_floor))
        scale = self._op("Mul", "scale", folded, unit)
        offset = self._op("Mul", "offset", self._op("Sub", "centred", bias, centre), a)
        steps = self._op("Div", "bias.steps", self._op("Add", "bias", self._given("beta"), offset), scale)
        whole = self.b.node("Add", [sums, self._shaped(self._op("Round", "bias.codes", steps))], f"{self.out}.whole")
        self.b.node("Mul", [whole, self._shaped(scale)], target)

    def _sums(self) -> str:
        """The layer's integer sums without its bias, as float32: exact below 2**24, and faster than ConvInteger's."""
        b, node, source = self.b, self.layer, self.layer.inputs[0]
        zero = b.node("Cast", [b.scale(source)[1]], f"{b.model.placement.scale_of[source]}.zero.real", to=TensorProto.FLOAT)
        codes = b.node("Cast", [b.codes(source)], f"{source}.q.real", to=TensorProto.FLOAT)
        x = b.node("Sub", [codes, zero], f"{source}.q.centred")
        weight = b.node("Cast", [b.weight_codes(node)[0]], f"{self.out}.codes.real", to=TensorProto.FLOAT)
        if node.op == "linear":
            return b.node("Gemm", [x, weight], f"{self.out}.sums", transB=1, name=node.name)
        a, shape = node.attributes, b.graph.constants[node.parameters["weight"]].shape
        return b.node(
            "Conv", [x, weight], f"{self.out}.sums", name=node.name, kernel_shape=list(shape[2:]), strides=a["strides"],
            pads=a["pads"], dilations=a["dilations"], group=a["groups"],
        )  # fmt: skip

    def _explicit(self, target: str) -> None:
        """A BATCH norm: y = a z + (beta - mean a)."""
        z = self.b.real(self.layer.inputs[0])
        a, centre = self._served(*self._observed(z))
        add = self._op("Sub", "add", self._given("beta"), self._op("Mul", "offset", centre, a))
        scaled = self.b.node("Mul", [z, self._shaped(a)], f"{self.out}.scaled")
        self.b.node("Add", [scaled, self._shaped(add)], target)

    def _observed(self, value: str) -> tuple[str, str]:
        """Mean and variance over batch and space, (channels,); centred before it is squared."""
        axes = [0, *range(2, self.rank)]
        kept = self.b.node("ReduceMean", [value], f"{self.out}.mean.kept", axes=axes, keepdims=1)
        centred = self._op("Sub", "deviations", value, kept)
        square = self._op("Mul", "squares", centred, centred)
        variance = self.b.node("ReduceMean", [square], f"{self.out}.variance", axes=axes, keepdims=0)
        return self.b.node("Reshape", [kept, self.b.integers("int.-1", -1)], f"{self.out}.mean"), variance

    def _served(self, mean: str, variance: str) -> tuple[str, str]:
        """a = gamma / sqrt(variance + epsilon) and the mean, both as they are served."""
        square = self._op("Add", "square", variance, self._op("Mul", "mean.squared", mean, mean))
        joined, both = self._joined("mean", mean), self._joined("square", square)
        variance = self._op("Sub", "joined.variance", both, self._op("Mul", "joined.squared", joined, joined))
        w, base, one = self._level("strength"), self._given("variance"), self._number(1.0)
        d = self._op("Mul", "d", self._op("Sub", "apart", joined, self._given("expected_mean")), self._given("unit"))
        shift = self._posterior("means", d, INPUTS.directions, INPUTS.uncertainty, "noise", "explained")
        shift = self._op("Mul", "shift", shift, self._given("deviation"))
        served_mean = self._op("Add", "served.mean", self._given("mean"), self._op("Mul", "moved", w, shift))
        ratio = self._op("Div", "ratio", variance, self._given("expected_variance"))
        ratio = self._op("Clip", "ratio.bounded", ratio, *(self._number(v) for v in RATIO))
        live = self._op("Mul", "live.channels", self._given("unit"), self._given("deviation"))
        logarithm = self._op("Mul", "ratio.live", self._op("Log", "ratio.log", ratio), live)
        spread = self._posterior(
            "variances", logarithm, INPUTS.variance_directions, INPUTS.variance_uncertainty, "variance_noise",
            "variance_explained",
        )  # fmt: skip
        followed = self._op("Mul", "base.followed", base, self._op("Exp", "factor", self._op("Mul", "w.spread", w, spread)))
        apart = self._op("Mul", "w.apart", w, self._op("Sub", "w.rest", one, w))
        beside = self._op("Mul", "beside", apart, self._op("Mul", "shift.squared", shift, shift))
        mixed = self._op("Add", "mixed", followed, beside)
        served = self._op(
            "Min", "served.variance", self._op("Max", "raised", mixed, self._given("lowest")), self._given("highest")
        )
        self.b.measured(self.site, mean, square, served_mean, served)
        root = self._op("Sqrt", "root", self._op("Add", "bounded", served, self._number(float(self.site.epsilon))))
        return self._op("Div", "a", self._given("gamma"), root), served_mean

    def _joined(self, what: str, batch: str) -> str:
        """Moments of the batch and of the images measured before, by their shares."""
        rest = self.b.node("Sub", [self._number(1.0), INPUTS.share], "share.rest")
        known = self._op("Mul", f"{what}.known", self._given(f"known_{what}"), INPUTS.share)
        return self._op("Add", f"{what}.joined", known, self._op("Mul", f"{what}.batch", batch, rest))

    def _posterior(self, what: str, d: str, directions: str, uncertainty: str, noise: str, explained: str) -> str:
        """Posterior mean of a shift, (channels,), from deviations d."""

        def op(kind: str, name: str, *inputs: str) -> str:
            return self._op(kind, f"{what}.{name}", *inputs)

        square = op("Mul", "squared", d, d)
        energy = self.b.node("ReduceMean", [square], f"{self.out}.statistics.{what}.energy", axes=[0], keepdims=1)
        excess = op("Max", "excess", op("Sub", "unexplained", energy, self._level(explained)), self._number(0.0))
        loose = op("Add", "loose", excess, op("Max", "noise.positive", self._level(noise), self._number(1e-30)))
        v, t = self._directions(directions), self.b.picked(uncertainty, self.place, f"{self.out}.given.{what}.uncertainty")
        shrunk = op("Mul", "shrunk", op("MatMul", "along", v, d), op("Div", "t.share", t, op("Add", "t.loose", t, loose)))
        left = op("Sub", "left", d, op("MatMul", "back", shrunk, v))
        return op("Mul", "posterior", op("Div", "gain", excess, loose), left)

    def _shifted(self, size: str, a: str) -> tuple[str, str]:
        """Live channels' folded scales as the nearest powers of two, and a as it then is (`refold.norms`)."""
        live = self._op("Greater", "live", size, self._held("floor", self.site.scale_floor))
        safe = self._op("Where", "size.safe", live, size, self._number(1.0))
        raised = self._op("Log", "log", self._op("Div", "size.raised", safe, self._number(0.75)))
        exponent = self._op("Floor", "exponent", self._op("Div", "log2", raised, self._number(float(np.log(2.0)))))
        power = self._op("Pow", "power", self._number(2.0), exponent)
        scaled = self._op("Mul", "a.scaled", a, self._op("Div", "power.share", power, safe))
        return self._op("Where", "size.served", live, power, size), self._op("Where", "a.served", live, scaled, a)

    # Inputs and names --------------------------------------------------------------------------------------------------------

    def _given(self, role: str) -> str:
        """The site's part of one row of the channels' input, (channels,)."""
        row = self.b.picked(INPUTS.channels, ROWS.index(role), f"rows.{role}")
        bounds = [self.b.integers(f"int.{v}", v) for v in (self.span.start, self.span.stop, 0)]
        return self.b.node("Slice", [row, *bounds], f"{self.out}.given.{role}")

    def _directions(self, source: str) -> str:
        bounds = [self.b.integers(f"int.{v}", v) for v in (self.span.start, self.span.stop, 1)]
        return self.b.node("Slice", [source, *bounds], f"{self.out}.given.{source}")

    def _level(self, name: str) -> str:
        levels = self.b.picked(INPUTS.levels, self.place, f"{self.out}.given.levels")
        first = LEVELS.index(name)
        bounds = [self.b.integers(f"int.{v}", v) for v in (first, first + 1, 0)]
        return self.b.node("Slice", [levels, *bounds], f"{self.out}.given.{name}")

    def _number(self, value: float) -> str:
        return self.b.constant(f"number.{value:g}", value)

    def _held(self, what: str, values: object) -> str:
        return self.b.constant(f"{self.out}.statistics.{what}", values)

    def _op(self, op: str, what: str, *inputs: str) -> str:
        return self.b.node(op, list(inputs), f"{self.out}.statistics.{what}")

    def _shaped(self, name: str) -> str:
        """A (channels,) tensor shaped to meet axis 1 of the layer's output."""
        axes = list(range(1, self.rank - 1))
        return (
            self.b.node("Unsqueeze", [name, self.b.integers(f"axes.{self.rank}", *axes)], f"{name}.{self.rank}d")
            if axes
            else name
        )


def _value(name: str, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))
