"""Two forms of one model compared: alike to rounding, or the first layer that differs.

Alike means: no answer is further off than 1e-4 of the spread of the answers, or than what the model itself does when its input
is moved by a few float32 roundings. Two float32 implementations of one network differ by 1e-6 to 1e-5 of the spread; a lost
write, a wrong axis or a dropped operator by a hundredth or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from export.frontend.run import layer_of, run_program
from export.interpret import float_parameters, run
from export.ir import Graph
from refold.errors import GateError

__all__ = ["alike", "check_lowered", "check_module", "differs", "first_apart", "graph_values", "module_records"]

TOLERANCE = 1e-4  # of the spread of the answers
FLOOR = 2e-6  # of the largest: answers that lie far from zero and near to each other
MOVED = 1 + 1e-6  # the factor that moves an input by a few roundings
NOISE = 16.0  # times what a model does when its input moves so
Record = tuple[str, Tensor]
Ask = Callable[[Tensor], Tensor]


def alike(reference: Tensor, ours: Tensor, ask: Ask, x: Tensor, among: Tensor | None = None) -> bool:
    """Whether two answers are the same to rounding.

    Args:
        reference, ours: answers to the same images, one row an image.
        ask: the reference's answer to any images; asked only where the two differ.
        x: these images, float32 (N, 3, H, W).
        among: the answers whose spread counts; default: the reference.
    """
    if reference.shape != ours.shape:
        return False
    if not bool(torch.isfinite(reference).all()):
        return True  # told elsewhere: there is nothing to be alike
    whole = (reference if among is None else among).double()
    spread = (whole - whole.mean(0)).std().item() if len(whole) > 1 else whole.std().item()
    allowed = TOLERANCE * spread + FLOOR * whole.abs().max().item()
    if _apart(reference, ours) <= allowed:  # a NaN is not
        return True
    again, moved = ask(x), ask(x * MOVED)
    if _apart(reference, again) > allowed:  # it answers at random: that is no rounding
        return False
    return _apart(reference, ours) <= NOISE * _apart(again, moved)


def _apart(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.shape == b.shape else math.inf


def module_records(model: nn.Module, x: Tensor) -> tuple[Tensor | None, list[Record]]:
    """The answer of a module (which may change) and what each of its parts returned, in the order in which they finished."""
    records: list[Record] = []

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, given, result: records.extend((name, t.detach().clone()) for t in _tensors(result))

    handles = [m.register_forward_hook(noting(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            return _only(model(x.clone())), records
    finally:
        for handle in handles:
            handle.remove()


def check_module(anew: Callable[[], nn.Module], program: ExportedProgram, x: Tensor) -> None:
    """Holds a captured program to the module it was captured from.

    Args:
        anew: a copy of the module, to run.
        x: float32 (N, 3, H, W).

    Raises:
        GateError: they differ, naming the first layer that does.
    """
    wanted, records = module_records(anew(), x)
    found: list[Tensor] = []
    got = run_program(program, x, lambda node, result: found.extend(t.clone() for t in _tensors(result)))

    def ask(images: Tensor) -> Tensor:
        with torch.no_grad():
            found = _only(anew()(images))
        assert found is not None
        return found

    if wanted is None or len(got) != 1 or not alike(wanted, ask(x), lambda images: wanted, x):
        return  # told elsewhere: several answers, or another one at each call
    if not alike(wanted, got[0], ask, x):
        raise differs("the program torch.export made of the model", first_apart(records, found))


def check_lowered(program: ExportedProgram, graph: Graph, x: Tensor) -> None:
    """Holds a graph to the program it was made from. Raises GateError naming the first layer that differs."""
    records: list[Record] = []

    def note(node: fx.Node, result: Any) -> None:
        if node.op == "call_function":
            records.extend((layer_of(node), t.clone()) for t in _tensors(result))

    wanted = run_program(program, x, note)
    got, found = graph_values(graph, x)
    if len(wanted) == 1 and not alike(wanted[0], got, lambda images: run_program(program, images)[0], x):
        raise differs("the graph that would be quantised", first_apart(records, found))


def graph_values(graph: Graph, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The float graph's answer for x, float32 (N, 3, H, W), and every value on the way there."""
    found: list[Tensor] = []

    def note(value: str, t: Tensor) -> Tensor:
        found.append(t)
        return t

    with torch.no_grad():
        return run(graph, x, float_parameters(graph), note), found


def differs(what: str, layer: str) -> GateError:
    """The refusal. `layer` is the first that is not as the model has it, where it is known."""
    return GateError(
        f"{what[0].upper()}{what[1:]} does not compute what the model computes{f', from {layer} on' if layer else ''}: nothing "
        "was saved. Rewrite that layer without in-place changes or branches that depend on how it is run, or report it with "
        "the model.",
        code="differs",
        detail=layer,
    )


def first_apart(records: Iterable[Record], found: list[Tensor]) -> str:
    """The first record that no tensor found elsewhere equals."""
    for layer, value in records:
        if value.dim() and value.is_floating_point() and not any(_close(value, t) for t in found):
            return layer
    return ""


def _close(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel() or a.shape[0] != b.shape[0] or not b.is_floating_point():
        return False
    return bool(torch.allclose(a.reshape(-1), b.reshape(-1), rtol=1e-3, atol=1e-4 * max(a.abs().max().item(), 1e-6)))


def _tensors(result: Any) -> Iterator[Tensor]:
    for value in result if isinstance(result, (tuple, list)) else [result]:
        if isinstance(value, Tensor):
            yield value


def _only(result: Any) -> Tensor | None:
    found = list(_tensors(result))
    return found[0] if len(found) == 1 else None
