"""From a torch.export program to the graph: one small function for each ATen operator that is understood.

Parts that do not depend on the picture are computed at once and become constants. An operator that is not in the table is
named, with the layer it sits in, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from export.frontend.faults import blamed
from export.frontend.names import Names
from export.frontend.run import layer_of, user_outputs
from export.ir import Graph, Node
from refold.errors import ModelError
from refold.norms import identifier

__all__ = ["BATCH", "HANDLERS", "Lowering", "Several", "handles", "known_operators", "lower"]

Handler = Callable[["Lowering", fx.Node, str], Any]
HANDLERS: dict[Any, Handler] = {}


class _Batch:
    """Stands for the batch size (or a number made from it), which is not known when a model is exported."""


BATCH = _Batch()


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, function))
        return function

    return register


def lower(program: ExportedProgram) -> Graph:
    """Args:
        program: without in-place operators (`export.frontend.functional`).

    Raises:
        ModelError: naming the operator and the layer that cannot be expressed.
        InternalError: a handler failed in a way nobody expected; the layer and the operator are named, too.
    """  # fmt: skip
    _fill()
    return Lowering(program).run()


def known_operators() -> set[Any]:
    """The targets of call_function nodes that `lower` has a handler for."""
    _fill()
    return set(HANDLERS)


def _fill() -> None:
    from export import aten  # noqa: F401  (fills HANDLERS)
    from export.frontend import writes  # noqa: F401


def _static(size: Any) -> int:
    return int(size) if isinstance(size, int) else -1


class Lowering:
    """Attributes:
    names: id of a tensor → its name in the model's state.
    values: the names of values. The nodes of the program have theirs from the beginning: what is made on the way gets another.
    layers: the names of layers, as identifiers.
    pieces: a concatenation that writes made → its axis, and each part with its length.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.env: dict[fx.Node, Any] = {}
        self.names: dict[int, str] = {}
        self.tensors: list[Tensor] = []
        self.values = Names(["input", *(n.name for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor))])
        self.layers = Names()
        self.pieces: dict[str, tuple[int, list[tuple[str, int]]]] = {}
        self.state: set[str] = set()
        self.node: fx.Node | None = None
        self.graph = Graph("", "", [], {}, {})

    def run(self) -> Graph:
        signature, state = self.program.graph_signature, dict(self.program.state_dict)
        state.update({k: v for k, v in self.program.constants.items() if isinstance(v, Tensor)})
        self.state = set(state)
        given = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in given:
                    self.env[node] = self.remember(state[given[node.name]], given[node.name])
                elif self.graph.input:
                    raise ModelError("The model takes more than one input; only one picture goes in.", code="inputs")
                else:
                    self.graph.input = self.env[node] = "input"
                    self._shape("input", node)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "get_attr":  # the body of a higher-order operator, which has no handler
                self.env[node] = None
            elif node.op == "output":
                self._output(node)
        self.graph.prune()
        return self.graph

    def remember(self, tensor: Tensor, name: str) -> Tensor:
        tensor = tensor.detach()
        self.names[id(tensor)] = name
        self.tensors.append(tensor)  # keeps the id alive
        return tensor

    def _shape(self, value: str, node: fx.Node) -> None:
        self.graph.shapes[value] = tuple(_static(s) for s in node.meta["val"].shape)

    def _output(self, node: fx.Node) -> None:
        results = [r for r in _flat(user_outputs(self.program.graph_signature, node.args[0])) if isinstance(r, fx.Node)]
        if len(results) != 1 or not isinstance(self.env[results[0]], str):
            raise ModelError(
                f"The model returns {len(results)} tensors; an image classifier returns one, the logits. Wrap it in a module "
                "that returns only those.",
                code="outputs",
            )
        self.graph.output = self.env[results[0]]
        shape = self.graph.shapes[self.graph.output]
        if len(shape) != 2 or shape[0] != -1 or shape[1] < 2:
            raise ModelError(
                f"The model's output has shape {_told(shape)}; logits are (batch, classes) with at least two classes.",
                code="outputs",
            )

    def _call(self, node: fx.Node) -> Any:
        arguments = [*_flat(node.args), *_flat(node.kwargs.values())]
        reads = [self.env[a] for a in arguments if isinstance(a, fx.Node)]
        value = node.meta.get("val")
        if not isinstance(value, (Tensor, tuple, list)):
            return BATCH if value is not None and not isinstance(value, (int, float, bool)) else value
        if not any(isinstance(r, (str, _Batch, Several)) for r in reads):
            args = fx.map_arg(node.args, lambda n: self.env[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: self.env[n])
            return node.target(*args, **kwargs)  # type: ignore[operator]
        handler = HANDLERS.get(node.target)
        if handler is None:
            raise ModelError(
                f"Layer {self.layer(node)} uses {_op_name(node.target)}, which Refold cannot export. Replace it, or wrap the "
                "model so that this part runs outside.",
                code="operator",
            )
        self.node = node
        with blamed(f"Layer {self.layer(node)} ({_op_name(node.target)})"):
            result = handler(self, node, node.name)
        if isinstance(result, str):
            self._shape(result, node)
        return result

    def layer(self, node: fx.Node) -> str:
        """The module path the node was written in, else its own name."""
        return layer_of(node)

    def arg(self, node: fx.Node, index: int, name: str = "", default: Any = None) -> Any:
        """Argument `index` with values for graph nodes: a value's name, a constant tensor, or a plain number."""
        raw = node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
        return fx.map_arg(raw, lambda n: self.env[n]) if raw is not None else default

    def constant(self, tensor: Tensor, role: str, layer: str) -> str:
        """Name under which a constant is kept: its own, if it is a parameter of the model, and then nothing else has it."""
        own = self.names.get(id(tensor), "")
        name, array = own or f"{layer}.{role}", tensor.detach().to(torch.float32).numpy()
        known = self.graph.constants.get(name)
        while (name in self.state and name != own) or (known is not None and not np.array_equal(known, array, equal_nan=True)):
            name += "_"
            known = self.graph.constants.get(name)
        self.graph.constants[name] = array
        return name

    def owner(self, tensor: Tensor | None, fallback: str) -> str:
        """Module path of a parameter: "layer1.0.bn1" of layer1.0.bn1.weight."""
        name = self.names.get(id(tensor), "") if tensor is not None else ""
        return name.rpartition(".")[0] or fallback

    def add(
        self,
        op: str,
        inputs: Sequence[Any],
        output: str,
        *,
        name: str = "",
        parameters: dict[str, Tensor | None] | None = None,
        shape_made: Sequence[int] | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node and returns the name of its value: `output` where that is the program's own or free, else a fresh one."""
        if self.node is None or output != self.node.name:
            output = self.values.fresh(output)
        layer = name or output
        while identifier(layer) in self.layers:
            layer = f"{layer}@{output}"
        self.layers.fresh(identifier(layer))
        if attributes.get("site"):
            attributes["site"] = layer
        held = {role: self.constant(t, role, layer) for role, t in (parameters or {}).items() if t is not None}
        self.graph.nodes.append(Node(layer, op, tuple(inputs), output, held, attributes))
        if shape_made is not None:
            self.graph.shapes[output] = tuple(shape_made)
        return output

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(_static(s) for s in node.meta["val"].shape)

    def reshape(self, source: str, output: str, shape: Sequence[int], layer: str = "") -> str:
        """Raises ModelError when the batch would be spread over two axes."""
        if list(shape).count(-1) > 1:
            raise ModelError(f"Layer {layer or output} spreads the batch over two axes: export cannot follow it.", code="batch")
        return self.add("reshape", [source], output, shape_made=shape, shape=tuple(shape))


class Several(list[Any]):
    """What split, chunk and unbind give: value names, taken by getitem."""


def _flat(values: Any) -> list[Any]:
    out: list[Any] = []
    for value in values if isinstance(values, (list, tuple)) or hasattr(values, "__iter__") else [values]:
        if isinstance(value, (list, tuple)):
            out += _flat(value)
        elif isinstance(value, dict):
            out += _flat(list(value.values()))
        else:
            out.append(value)
    return out


def _op_name(target: Any) -> str:
    return (
        str(target).replace("aten.", "torch.ops.aten.") if "aten" in str(target) else getattr(target, "__name__", str(target))
    )


def _told(shape: Sequence[int]) -> str:
    return "(" + ", ".join("batch" if s == -1 else str(s) for s in shape) + ")"
