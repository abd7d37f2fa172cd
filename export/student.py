"""The cloud's student: the integer model as a trainable torch program, with the same codes and the same scales.

    norms.<site>.{gamma, beta}            parameters      <site> with "__" for ".": `refold.norms.identifier`
    norms.<site>.{mean, variance}         buffers
    layers.<layer>.{codes, scale, bias, bias_step}  buffers   int8 codes of the unfolded weights, their scales; and `floor`
                                                              where folded scales are powers of two
    constants.<name>                                      everything else
    epsilons                                              of the norms behind integer layers, by channel, layer after layer

Activation scales are arguments of aten.fake_quantize_per_tensor_affine nodes. torch 2.13 cannot trace these (no fake
kernel), so the program is exported with a clone in each one's place, and the clones are replaced afterwards.

Distilling a float twin would train another function than the device's; here the rounding is in the forward pass and gradients
go straight through it (Bengio et al. 2013), to the norms alone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from export.frontend.names import Names
from export.interpret import FakeQuantise, run, simulated
from export.ir import Node
from export.quantise import IntegerModel
from export.scales import Scale
from refold.errors import ModelError
from refold.norms import FoldedAffine, NormSite, identifier, refold

__all__ = ["Student", "flat", "student_program"]

flat = identifier

ROLES = ("gamma", "beta", "mean", "variance")


class _Holder(nn.Module):
    """A named place for tensors."""

    def buffer(self, name: str, value: NDArray[np.generic]) -> None:
        self.register_buffer(name, torch.from_numpy(np.array(value)))

    def child(self, name: str) -> _Holder:
        if name not in self._modules:
            self.add_module(name, _Holder())
        found = self._modules[name]
        assert isinstance(found, _Holder)
        return found

    def tensor(self, name: str) -> Tensor:
        found = getattr(self, name)
        assert isinstance(found, Tensor)
        return found


class Student(nn.Module):
    """float32 (N, 3, H, W) → logits float32 (N, classes); any N."""

    epsilons: Tensor

    def __init__(self, model: IntegerModel) -> None:
        super().__init__()
        self._graph, self._sites = model.graph, model.sites
        self.norms, self.layers, self.constants = _Holder(), _Holder(), _Holder()
        self._names, self._constants = Names(dir(self.constants)), dict[str, str]()
        self._integer = set(model.weights)
        self.at: FakeQuantise | None = None
        self._scales = {a.tensor: model.scale_of(a.tensor) for a in model.table.activations}
        for node in model.graph.nodes:
            self._hold(model, node)
        self._rounded = [o for o in model.weights if (site := model.sites.get(o)) is not None and site.has_norm]
        each = [np.full(self._sites[o].channels, self._sites[o].epsilon, np.float64) for o in self._rounded]
        if each:  # an empty tensor cannot be saved
            self.register_buffer("epsilons", torch.from_numpy(np.concatenate(each)))

    def _hold(self, model: IntegerModel, node: Node) -> None:
        site = model.sites.get(node.output)
        kept = set(node.parameters)
        if site is not None and site.has_norm:
            place = self.norms.child(identifier(site.name))
            for role in ROLES:
                value = getattr(site.exported, role)
                if value.size and role in ("gamma", "beta"):
                    place.register_parameter(role, nn.Parameter(torch.from_numpy(np.array(value))))
                elif value.size:
                    place.buffer(role, value)
            kept -= set(ROLES)
        if node.output in model.weights:
            w, place = model.weights[node.output], self.layers.child(identifier(node.output))
            place.buffer("codes", w.codes)
            place.buffer("scale", w.scale.reshape(-1, *[1] * (w.codes.ndim - 1)))
            self._hold_bias(model, node.output, place)
            if site is not None and site.power_of_two:
                place.buffer("floor", site.scale_floor)
            kept -= {"weight", "bias"}
        for role in kept:
            given = node.parameters[role]
            if given not in self._constants:
                self._constants[given] = self._names.fresh(identifier(given))
                self.constants.buffer(self._constants[given], model.graph.constants[given])

    def _hold_bias(self, model: IntegerModel, output: str, place: _Holder) -> None:
        """The layer's bias; where no norm follows, as the int32 bias of the engine represents it."""
        site = model.sites[output]
        xs = float(np.float32(self._scales[site.input_tensor].scale))
        if site.has_norm:
            place.buffer("bias", site.layer_bias)
            place.buffer("bias_step", xs * np.maximum(site.weight_scale.astype(np.float64), np.finfo(np.float32).tiny))
            return
        folded = refold(site, site.exported, xs)
        assert isinstance(folded, FoldedAffine)
        place.buffer("bias", (folded.bias.astype(np.float64) * xs * folded.weight_scale).astype(np.float32))

    def _rounded_biases(self) -> dict[str, Tensor]:
        """By output: layer biases that, seen through their norms, lie on the engine's int32 steps; no gradient goes through.

        Without it every layer is off by up to half such a step, which tips one code in a thousand and, ten layers on, a tenth.
        All layers at once: twenty operations for each of fifty layers made four fifths of the program.
        """
        if not self._rounded:
            return {}
        sites = [self._sites[output] for output in self._rounded]
        norms, places = (
            [self.norms.child(identifier(s.name)) for s in sites],
            [self.layers.child(identifier(o)) for o in self._rounded],
        )
        gamma = torch.cat([self._served_gamma(s, p) for s, p in zip(sites, places, strict=True)]).detach().double()
        beta, mean, variance = (torch.cat([n.tensor(role) for n in norms]).detach().double() for role in ROLES[1:])
        bias, step = (torch.cat([p.tensor(name) for p in places]) for name in ("bias", "bias_step"))
        a = gamma * (variance + self.epsilons).rsqrt()
        a = torch.where(a == 0, torch.ones_like(a), a)
        b = beta + (bias.double() - mean) * a
        step = step * a.abs()
        rounded = bias + (((b / step).round() * step - b) / a).to(torch.float32)
        return dict(zip(self._rounded, torch.split(rounded, [s.channels for s in sites]), strict=True))

    def _served_gamma(self, site: NormSite, place: _Holder) -> Tensor:
        """gamma as the engine has it: on a site of powers of two, moved so that the folded scale is one (`refold.norms`)."""
        norm = self.norms.child(identifier(site.name))
        gamma = norm.tensor("gamma")
        if not site.power_of_two:
            return gamma
        a = gamma.detach().double() * (norm.tensor("variance").double() + site.epsilon).rsqrt()
        size = place.tensor("scale").flatten().double() * a.abs()
        live = size > place.tensor("floor")
        size = torch.where(live, size, torch.ones_like(size))
        mantissa, exponent = torch.frexp(size)
        nearest = torch.pow(2.0, (exponent - (mantissa < 0.75).to(torch.int32)).double())
        return gamma * torch.where(live, nearest / size, torch.ones_like(size)).to(torch.float32)

    def _parameters_of(self, node: Node, biases: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        site = self._sites.get(node.output)
        for role, name in node.parameters.items():
            if site is not None and site.has_norm and role in ROLES:
                found[role] = self.norms.child(identifier(site.name)).tensor(role)
            elif not (node.output in self._integer and role in ("weight", "bias")):
                found[role] = self.constants.tensor(self._constants[name])
        if node.output in self._integer and site is not None:
            place = self.layers.child(identifier(node.output))
            found["weight"] = place.tensor("codes").to(torch.float32) * place.tensor("scale")
            found["bias"] = biases[node.output] if site.has_norm else place.tensor("bias")
            if site.has_norm:
                found["gamma"] = self._served_gamma(site, place)
        return found

    def forward(self, x: Tensor) -> Tensor:
        biases = self._rounded_biases()
        return run(self._graph, x, lambda node: self._parameters_of(node, biases), self.at or simulated(self._scales))

    def marked(self, rounded: list[Scale]) -> Student:
        """Lets every rounding be a clone, and notes in `rounded` which scale it stands for."""

        def at(value: str, x: Tensor) -> Tensor:
            if value not in self._scales:
                return x
            rounded.append(self._scales[value])
            return x.clone()

        self.at = at
        return self


def student_program(model: IntegerModel) -> bytes:
    """`student.pt2`: the exported program, batch size free. Raises ModelError when torch cannot export it."""
    size = model.graph.shapes[model.graph.input][1:]
    rounded: list[Scale] = []
    student = Student(model).eval().marked(rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(student, (torch.zeros(2, *size),), dynamic_shapes=({0: Dim("batch")},))
        except Exception as e:
            raise ModelError("torch.export cannot express the student of this model.", code="student", detail=str(e)) from e
        _put_rounding(program, rounded)
        out = io.BytesIO()
        torch.export.save(program, out)
    return out.getvalue()


def _put_rounding(program: ExportedProgram, rounded: list[Scale]) -> None:
    """Graph surgery: the n-th clone becomes the n-th fake-quantisation."""
    clones = [n for n in program.graph.nodes if n.target == torch.ops.aten.clone.default]
    for node, scale in zip(clones, rounded[-len(clones) :], strict=True):
        node.target = torch.ops.aten.fake_quantize_per_tensor_affine.default
        node.args = (node.args[0], scale.scale, scale.zero_point, 0, scale.levels - 1)
        node.kwargs = {}
    program.graph_module.recompile()
