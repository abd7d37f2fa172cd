"""Runs a captured program operator by operator, on copies of its state: nothing of the person's is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind

from refold.errors import ModelError

__all__ = ["layer_of", "run_program", "user_outputs"]

Visit = Callable[[fx.Node, Any], None]


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, visit: Visit | None) -> None:
        super().__init__(module)
        self._visit = visit

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self._visit is not None:
            self._visit(n, result)
        return result


def run_program(
    program: ExportedProgram, x: Tensor, visit: Visit | None = None, module: fx.GraphModule | None = None
) -> list[Tensor]:
    """The tensors a program returns, in order.

    Args:
        x: float32 (N, 3, H, W), contiguous as a person's own tensor is: what is a view and what is a copy depends on it.
        visit: called with every node and its result right after it ran.
        module: another graph with the same inputs and outputs, in place of the program's own.

    Raises:
        ModelError: the program wants something else than one tensor.
    """
    state: dict[str, Any] = {**program.state_dict, **program.constants}
    copies: dict[int, Any] = {}  # tensors with two names stay one tensor
    given: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            given.append(x.clone())
            continue
        if spec.target is None or spec.target not in state:
            raise ModelError(f"The program wants {spec.arg.name}, which is neither a weight nor the image.", code="inputs")
        held = state[spec.target]
        given.append(copies.setdefault(id(held), held.detach().clone() if isinstance(held, Tensor) else held))
    with torch.no_grad():
        results = _Watched(module or program.graph_module, visit).run(*given, enable_io_processing=False)
    return [r for r in user_outputs(program.graph_signature, results) if isinstance(r, Tensor)]


def user_outputs(signature: ExportGraphSignature, results: Any) -> Iterator[Any]:
    """Of all that a program returns, what the person's forward returned: changed buffers are left out."""
    for spec, result in zip(signature.output_specs, results, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            yield result


def layer_of(node: fx.Node) -> str:
    """The module path a node was written in, else its own name."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(v[0]) for v in reversed(list(stack.values())) if v[0]), "")
    return path.removeprefix("L['self'].") or node.name
