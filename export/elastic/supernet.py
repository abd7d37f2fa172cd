"""The supernet: the exporter's graph with elastic quantisers, and every number in it that is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from export.elastic.layout import Layout, layout_of
from export.elastic.quantisers import UNBOUNDED, Bounds, Table, ValueQuantiser, WeightQuantiser
from export.elastic.space import PINNED, ActivationForm, Configuration, Space, WeightForm
from export.interpret import batches, run
from export.ir import Graph, Node
from export.operators import Norm
from export.placement import Placement, is_integer_layer, place
from export.quantise import integer_model, quantised_weights
from export.rules import apply_rules
from export.scales import Scale
from refold.errors import InputError

__all__ = ["Supernet", "batch_statistics"]

Progress = Callable[[str], None]
SAMPLED = 8192  # numbers of a value that its first steps are fitted to
ZERO = -1e-9  # a value that calibration never saw below this is never negative (EQ-Net's code)
KINDS = {True: "symmetric", False: "asymmetric"}


def batch_statistics(node: Node, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """Batch normalisation with the batch's own statistics: that of training."""
    return F.batch_norm(x, None, None, p["gamma"], p["beta"], True, 0.0, node.attributes["epsilon"])


class Supernet:
    """Attributes:
    captured: the float graph as captured; what an export starts from.
    graph: the same after the rules; placement, layout: of it.
    constants: every constant by name, float32; those in `trainable` are learned.
    """

    def __init__(
        self,
        captured: Graph,
        space: Space,
        parameters: Iterable[str],
        constants: Mapping[str, Tensor],
        weights: Mapping[str, WeightQuantiser],
        values: Mapping[str, ValueQuantiser],
    ) -> None:
        self.captured, self.space = captured, space
        self.graph = apply_rules(captured)
        self.placement = place(self.graph)
        self.layout: Layout = layout_of(self.graph, self.placement)
        self.constants, self.weights, self.values = dict(constants), dict(weights), dict(values)
        self.trainable = _trainable(self.graph, self.placement, set(parameters))
        producers = self.graph.producers()
        self._weight_names = {p.name: producers[p.output].parameters["weight"] for p in self.layout.layers}

    @classmethod
    def build(
        cls,
        captured: Graph,
        space: Space,
        parameters: Iterable[str],
        x: NDArray[np.float32],
        progress: Progress = lambda what: None,
    ) -> Supernet:
        """A supernet at its first steps.

        Args:
            parameters: names of the constants that the model itself calls parameters.
            x: calibration inputs, float32 (N, 3, H, W); 256 do.

        Raises:
            ModelError: no norm, a shared norm, or too few integer layers.
            InputError: the model's values on the calibration pictures are not finite.
        """
        graph = apply_rules(captured)
        placement = place(graph)
        layout = layout_of(graph, placement)
        codes = quantised_weights(graph, placement, 127)
        integer_model(graph, placement, codes, dict.fromkeys(placement.scaled, Scale(1.0, 0)), 127)  # refuses what export would
        constants = {name: torch.from_numpy(np.array(value)) for name, value in graph.constants.items()}
        producers = graph.producers()
        progress("watching the values")
        seen = _sampled(graph, placement, constants, x)
        weights, values = {}, {}
        for p in layout.layers:
            progress(f"fitting the steps of {p.name}")
            bits = (PINNED,) if p.pinned else space.weight_bits
            weight = constants[producers[p.output].parameters["weight"]]
            weights[p.name] = WeightQuantiser.fitted(weight, bits, space.granularities, space.weight_symmetries)
        for v in layout.values:
            progress(f"fitting the steps of {v.name}")
            bits = (PINNED,) if v.pinned else space.activation_bits
            bounds = _bounds(producers, v.name)
            non_negative = bounds[0] >= 0 or float(seen[v.name].min()) >= ZERO
            values[v.name] = ValueQuantiser.fitted(seen[v.name], bits, space.activation_symmetries, non_negative, bounds)
        return cls(captured, space, parameters, constants, weights, values)

    # -- learned numbers

    def learned(self) -> dict[str, Tensor]:
        """By a name that stays the same from run to run, in a fixed order."""
        held = {f"constant/{name}": self.constants[name] for name in sorted(self.trainable)}
        for key, table in sorted(self._tables().items()):
            held |= {f"{key}/{name}": tensor for name, tensor in table.learned().items()}
        return held

    def state(self) -> dict[str, Tensor]:
        """Everything `restore` needs besides the captured graph and the space."""
        held = {f"constant/{name}": tensor for name, tensor in self.constants.items()}
        for key, table in self._tables().items():
            held |= {f"{key}/{name}": tensor for name, tensor in table.tensors().items()}
        return {name: tensor.detach() for name, tensor in held.items()}

    @classmethod
    def restore(cls, captured: Graph, space: Space, parameters: Iterable[str], state: Mapping[str, Tensor]) -> Supernet:
        """Raises InputError when the state is of another network or space."""
        try:
            return cls._restored(captured, space, parameters, state)
        except KeyError as e:
            raise InputError(f"The checkpoint is of another network or space: it lacks {e.args[0]}.", code="checkpoint") from e

    @classmethod
    def _restored(cls, captured: Graph, space: Space, parameters: Iterable[str], state: Mapping[str, Tensor]) -> Supernet:
        graph = apply_rules(captured)
        layout = layout_of(graph, place(graph))
        constants = {name: state[f"constant/{name}"].clone() for name in graph.constants}

        def table(key: str, bits: tuple[int, ...]) -> Table:
            base, zero, ratio = (state[f"{key}/{name}"].clone() for name in ("base", "zero", "ratio"))
            offset = state.get(f"{key}/offset")
            return Table(bits, base, zero, ratio, None if offset is None else offset.clone())

        weights, values, producers = {}, {}, graph.producers()
        for p in layout.layers:
            bits = (PINNED,) if p.pinned else space.weight_bits
            both = [(g, s) for g in space.granularities for s in space.weight_symmetries]
            weights[p.name] = WeightQuantiser({k: table(_weight_key(p.name, k), bits) for k in both})
        for v in layout.values:
            bits = (PINNED,) if v.pinned else space.activation_bits
            non_negative = f"value/{v.name}/non-negative/base" in state
            kinds = (True,) if non_negative else space.activation_symmetries
            tables = {s: table(_value_key(v.name, s, non_negative), bits) for s in kinds}
            values[v.name] = ValueQuantiser(tables, non_negative, _bounds(producers, v.name))
        return cls(captured, space, parameters, constants, weights, values)

    def _tables(self) -> dict[str, Table]:
        held = {_weight_key(name, k): t for name, q in self.weights.items() for k, t in q.tables.items()}
        for name, quantiser in self.values.items():
            held |= {_value_key(name, s, quantiser.non_negative): t for s, t in quantiser.tables.items()}
        return held

    # -- what it computes

    def __call__(self, x: Tensor, configuration: Configuration, norm: Norm = batch_statistics) -> Tensor:
        """Logits float32 (N, classes) of one configuration, differentiable in everything learned."""
        weights = {
            p.output: self.weights[p.name](self.weight_of(p.name), configuration.weight[p.name]) for p in self.layout.layers
        }

        def parameters(node: Node) -> Mapping[str, Tensor]:
            found = {role: self.constants[name] for role, name in node.parameters.items()}
            if node.output in weights:
                found["weight"] = weights[node.output]
            return found

        forms: Mapping[str, ActivationForm] = configuration.activation

        def at(value: str, y: Tensor) -> Tensor:
            return self.values[value](y, forms[value]) if value in forms else y

        return run(self.graph, x, parameters, at, norm)

    def weight_of(self, name: str) -> Tensor:
        """The float weight of the layer called `name`."""
        return self.constants[self._weight_names[name]]

    def regular_weights(self) -> list[Tensor]:
        """The weights whose distribution is regularised: all but the first layer's."""
        return [self.weight_of(p.name) for p in self.layout.layers[1:]]

    def weight_codes(self, name: str, form: WeightForm) -> tuple[Tensor, Tensor]:
        """int8 codes of the layer's weight and float32 steps (channels,)."""
        return self.weights[name].codes(self.weight_of(name), form)


def _weight_key(name: str, kind: tuple[bool, bool]) -> str:
    return f"weight/{name}/{'channel' if kind[0] else 'tensor'}-{KINDS[kind[1]]}"


def _value_key(name: str, symmetric: bool, non_negative: bool) -> str:
    return f"value/{name}/{'non-negative' if non_negative else KINDS[symmetric]}"


def _trainable(graph: Graph, placement: Placement, parameters: set[str]) -> set[str]:
    found = {name for name in graph.constants if name in parameters}
    used: set[str] = set()
    for node in graph.nodes:
        used.update(node.parameters.values())
        roles = {"gamma", "beta"} | ({"weight", "bias"} if is_integer_layer(placement, node) else set())
        found |= {name for role, name in node.parameters.items() if role in roles}
    statistics = {name for n in graph.nodes for role, name in n.parameters.items() if role in ("mean", "variance")}
    return (found & used) - statistics


def _bounds(producers: Mapping[str, Node], value: str) -> Bounds:
    node = producers.get(value)
    return (node.activation if node is not None else None) or UNBOUNDED


def _sampled(graph: Graph, placement: Placement, constants: Mapping[str, Tensor], x: NDArray[np.float32]) -> dict[str, Tensor]:
    """Numbers of every scaled value in the float model: at random, and the extremes."""
    kept: dict[str, list[Tensor]] = {value: [] for value in placement.scaled}
    each = max(2, SAMPLED // max(1, -(-len(x) // 32)))
    generator = torch.Generator().manual_seed(0)

    def at(value: str, y: Tensor) -> Tensor:
        if value in kept:
            flat = y.flatten()
            index = torch.randint(flat.numel(), (min(each, flat.numel()),), generator=generator)
            kept[value].append(torch.cat([flat[index], flat.amin().reshape(1), flat.amax().reshape(1)]))
        return y

    def parameters(node: Node) -> Mapping[str, Tensor]:
        return {role: constants[name] for role, name in node.parameters.items()}

    with torch.no_grad():
        for batch in batches(x):
            if not bool(torch.isfinite(run(graph, batch, parameters, at)).all()):
                raise InputError("The model's logits on the pictures are not finite: check --preprocess and the weights.")
    return {value: torch.cat(parts) for value, parts in kept.items()}
