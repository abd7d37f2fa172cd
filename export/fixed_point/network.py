"""The captured graph with every trainable tensor and every value of an integer engine on its own fixed-point grid.

    master      float32, what updates are added to
    quantised   the leaf the graph computes with: drawn from the master after each update, and what an export ships
    statistics  running mean and variance of the batch norms, float32

Gradients are taken at the quantised leaf and used on the master: the straight-through estimator without a mask, so that a
saturated weight can come back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from export.fixed_point.number import FixedPoint, largest_fraction, quantise
from export.fixed_point.settings import Settings
from export.interpret import run
from export.ir import Graph, Node
from export.placement import place
from export.rules import apply_rules
from refold.errors import ModelError
from refold.norms import nearest_power_of_two

__all__ = ["Network", "fitted", "generator_of", "macs"]

VECTORS = ("bias", "gamma", "beta", "slope")
STATISTICS = ("mean", "variance")
SAMPLE = 8192  # values of an activation on which fractions are compared
FINER = 2  # fractions beyond the one that holds the largest value, which may clip a few outliers
STEEP = ("sqrt", "rsqrt", "log", "reciprocal", "pow_constant", "div")  # infinite slope at 0, which a grid holds exactly
SPREAD = 0.5  # variance of fresh weights times their fan-in


class Network:
    """What a training trains.

    Attributes:
        captured: the float graph as `export.capture` made it; its constants are the values at the start.
        graph: after the rules; its constants are not used once the network is made.
        master, quantised: by constant's name.
        forms: format of each weight tensor, by constant's name.
        values: format of each value that an engine holds as codes (`activation_word` only), once seen.

    Raises:
        ModelError: nothing in the model is trainable.
    """

    def __init__(self, captured: Graph, settings: Settings) -> None:
        self.captured, self.settings = captured, settings
        self.graph = apply_rules(captured)
        self.placement = place(self.graph)
        self.weights = list(dict.fromkeys(n.parameters["weight"] for n in self.graph.nodes if "weight" in n.parameters))
        if not self.weights:
            raise ModelError("The model has no convolution or linear layer: there is nothing to train.", code="no-layers")
        roles = {name: role for n in self.graph.nodes for role, name in n.parameters.items()}
        self.master = {name: _tensor(captured.constants.get(name, self.graph.constants[name])) for name, role in roles.items()
                       if role in ("weight", *VECTORS)}  # fmt: skip
        self.statistics = {name: _tensor(self.graph.constants[name]) for name, role in roles.items() if role in STATISTICS}
        self._fixed = {n: _tensor(self.graph.constants[n]) for n in roles if n not in self.master and n not in self.statistics}
        self.leader = self._leaders()
        self._clamps = {n.output: n.activation for n in self.graph.nodes if n.activation is not None}
        self._maker = self._makers()
        self._scaled = set(self.placement.scaled)
        self._steep = {v for n in self.graph.nodes if n.op in STEEP for v in n.inputs}
        if settings.from_scratch:
            self._initialise()
        self.forms = {name: self._first_form(name) for name in self.weights}
        self.values: dict[str, FixedPoint] = {}
        self.quantised: dict[str, Tensor] = {}
        self.requantise(generator_of(settings.seed, "start"))

    def _leaders(self) -> dict[str, str]:
        """Weight tensor whose format a vector follows: its node's own, else the one before it in execution order."""
        leader: dict[str, str] = {}
        current = self.weights[0]
        for node in self.graph.nodes:
            current = node.parameters.get("weight", current)
            for role, name in node.parameters.items():
                if role in VECTORS:
                    leader.setdefault(name, current)
        return leader

    def _makers(self) -> dict[str, str]:
        """Weight tensor whose format a value has where values follow layers."""
        current = self.weights[0]
        maker = {self.graph.input: current}
        for node in self.graph.nodes:
            current = node.parameters.get("weight", current)
            maker[node.output] = current
        return maker

    def _initialise(self) -> None:
        """Truncated normal of variance 1/2 over the fan-in; fresh norms; no biases."""
        generator = generator_of(self.settings.seed, "weights")
        for name in self.weights:
            weight = self.master[name]
            deviation = (SPREAD / (weight.numel() / weight.shape[0])) ** 0.5
            torch.nn.init.trunc_normal_(weight, 0.0, deviation, -(3**0.5) * deviation, 3**0.5 * deviation, generator=generator)
        for node in self.graph.nodes:
            for role, name in node.parameters.items():
                if role in ("gamma", "variance"):
                    self._vector(name).fill_(1.0)
                elif role in ("bias", "beta", "mean"):
                    self._vector(name).zero_()

    def _vector(self, name: str) -> Tensor:
        return self.statistics[name] if name in self.statistics else self.master[name]

    def _first_form(self, name: str) -> FixedPoint:
        s = self.settings
        fraction = s.fraction if s.fraction is not None else largest_fraction(s.word, self.largest(name))
        return FixedPoint(s.word, fraction, narrow=True)

    def largest(self, name: str) -> float:
        """Magnitude of the largest master value."""
        return float(self.master[name].abs().max())

    def form_of(self, name: str) -> FixedPoint:
        """Format of a trainable tensor. A vector's fraction gives way where its largest value would saturate."""
        if name in self.forms:
            return self.forms[name]
        leader, word = self.forms[self.leader[name]], self.settings.vector_word
        fraction = largest_fraction(word or leader.word, self.largest(name))
        return FixedPoint(word, fraction) if word else FixedPoint(leader.word, min(fraction, leader.fraction))

    def requantise(self, generator: torch.Generator) -> None:
        """Draws every leaf anew from its master; all gradients are gone."""
        for name, value in self.master.items():
            drawn = value.clone() if self.settings.float32 else self.form_of(name).stochastic(value, generator)
            self.quantised[name] = drawn.requires_grad_()

    def parameters(self, node: Node) -> Mapping[str, Tensor]:
        found = {role: self._constant(name) for role, name in node.parameters.items()}
        if self.settings.power_of_two and {"weight", "gamma"} <= set(found) and not self.settings.float32:
            step, epsilon = self.forms[node.parameters["weight"]].step, node.attributes["epsilon"]
            found["gamma"] = served_gamma(found["gamma"], found["variance"], step, epsilon)
        return found

    def _constant(self, name: str) -> Tensor:
        for place_ in (self.quantised, self.statistics, self._fixed):
            if name in place_:
                return place_[name]
        raise KeyError(name)

    def form_of_value(self, value: str) -> FixedPoint | None:
        """Format of an activation; None where it stays in float."""
        if value not in self._scaled or self.settings.float32:
            return None
        if self.settings.activation_word is not None:
            return self.values.get(value)
        layer = self.forms[self._maker[value]]
        return FixedPoint(layer.word, layer.fraction)

    def train(self, x: Tensor, generator: torch.Generator, observe: bool = False) -> Tensor:
        """Logits in training mode: batch statistics, running ones updated.

        Args:
            observe: choose the fraction of every activation by what passes now (`activation_word` only).
        """
        at_random = generator if self.settings.stochastic_activations else None

        def at(value: str, y: Tensor) -> Tensor:
            if value in self._scaled and self.settings.activation_word is not None and (observe or value not in self.values):
                self.values[value] = fitted(y.detach(), self.settings.activation_word, self._clamps.get(value))
            form = self.form_of_value(value)
            y = y if form is None else _rounded(y, form, at_random)
            if value in self._steep and y.requires_grad:
                y.register_hook(_finite)  # type: ignore[no-untyped-call]
            return y

        return run(self.graph, x, self.parameters, at, self._norm)

    def _norm(self, node: Node, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        momentum, epsilon = self.settings.statistics_momentum, node.attributes["epsilon"]
        return F.batch_norm(y, p["mean"], p["variance"], p["gamma"], p["beta"], True, momentum, epsilon)

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """Chooses the fraction of every activation by what passes in an evaluation, behind the fractions chosen before it."""
        if self.settings.activation_word is None or self.settings.float32:
            return
        word = self.settings.activation_word

        def at(value: str, y: Tensor) -> Tensor:
            if value in self._scaled:
                self.values[value] = fitted(y, word, self._clamps.get(value))
                y = _rounded(y, self.values[value], None)
            return y

        run(self.graph, x, self.parameters, at)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """Logits as an engine computes them: running statistics, activations rounded to nearest."""

        def at(value: str, y: Tensor) -> Tensor:
            form = self.form_of_value(value)
            return y if form is None else _rounded(y, form, None)

        return run(self.graph, x, self.parameters, at)

    def constants(self) -> dict[str, np.ndarray]:
        """Every constant of the trained network: quantised tensors, statistics, and what never changed."""
        return {name: t.detach().numpy().copy() for group in (self._fixed, self.statistics, self.quantised)
                for name, t in group.items()}  # fmt: skip


def served_gamma(gamma: Tensor, variance: Tensor, step: float, epsilon: float) -> Tensor:
    """gamma moved so that step * |gamma| / sigma is a power of two, as `refold.norms` serves it; gradients pass straight."""
    size = step * gamma.detach().double().abs() * (variance.double() + float(np.float32(epsilon))).rsqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    nearest = torch.from_numpy(nearest_power_of_two(size.numpy()))
    return gamma * (nearest / size).to(torch.float32)


def generator_of(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """Randomness of one step or epoch, from its number alone: a run that goes on after a kill draws what it would have drawn.

    torch's generator looks at the lowest 32 bits of its seed only, so these are a digest.
    """
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(value, np.float32))


def _rounded(x: Tensor, form: FixedPoint, generator: torch.Generator | None) -> Tensor:
    if generator is None and form.word <= 16:  # the very function the student and the calibration use
        return torch.fake_quantize_per_tensor_affine(x, form.step, form.zero_point, 0, 2**form.word - 1)
    return quantise(x, form, generator)


def fitted(x: Tensor, word: int, clamp: tuple[float, float] | None) -> FixedPoint:
    """The format for an activation: of the fractions that hold its largest value, and two finer ones, that of the least squared
    error. Non-negative activations get unsigned codes.

    Args:
        clamp: bounds of an absorbed activation function; the codes then never reach outside, so that a runtime may drop it.
    """
    low, high = float(x.min()), float(x.max())
    signed = low < 0
    first = largest_fraction(word, max(-low, high), signed)
    forms = [FixedPoint(word, min(f, 64), signed) for f in range(first, first + FINER + 1)]
    if clamp is not None:
        while forms[0].highest > clamp[1] or forms[0].lowest < clamp[0]:
            forms = [FixedPoint(word, f.fraction + 1, signed) for f in forms]
    part = x.flatten()[:: max(1, x.numel() // SAMPLE)]
    return min(forms, key=lambda f: float((f.nearest(part) - part).square().mean()))


def macs(graph: Graph) -> dict[str, int]:
    """Multiplications of one picture in every weight tensor's layers, by constant's name."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if "weight" not in node.parameters:
            continue
        name = node.parameters["weight"]
        shape, weight = graph.shapes[node.output], graph.constants[name].shape
        if node.op == "conv_transpose":
            positions = int(np.prod(graph.shapes[node.inputs[0]][2:]))
        elif node.op == "linear":
            positions = int(np.prod([s for s in shape[1:-1] if s > 0]))
        else:
            positions = int(np.prod(shape[2:]))
        found[name] = found.get(name, 0) + int(np.prod(weight)) * positions
    return found
