"""A captured program without in-place operators: every write through a view reaches what the view looks at.

torch.export keeps `mul_`, `copy_` and their kin, and every view of the tensor they change. Read as pure operators they lose the
change for all other views. Here a write makes a new tensor, the write is put back into the tensor it views
(`slice_scatter`, `select_scatter`, the inverse reshape or permutation), and whoever reads another view afterwards reads it
anew. This is what torch calls functionalisation; docs/adr/013 says why it is not torch's own `run_decompositions`.

What shares memory is not guessed from operators' schemas: the program is run once, on a small batch, and storages are compared.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind

from export.frontend.run import layer_of, run_program, user_outputs
from refold.errors import ModelError

__all__ = ["functionalise"]

aten = torch.ops.aten


def functionalise(program: ExportedProgram, example: Tensor) -> ExportedProgram:
    """The same program in pure operators; the very same object where it has no others. Nodes keep their names.

    Args:
        example: float32 (N, 3, H, W) with N of at least 2; the program is run on it once.

    Raises:
        ModelError: a write goes through a view that cannot be followed, or the answer depends on what earlier images left.
    """
    if any(_writes(node) for node in program.graph.nodes):
        program = _Rewriting(program, example).run()
    output = next(n for n in program.graph.nodes if n.op == "output")
    for spec, result in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind is OutputKind.BUFFER_MUTATION and isinstance(result, fx.Node):
            held = {s.target: s.arg.name for s in program.graph_signature.input_specs}[spec.target]
            before = next(n for n in program.graph.nodes if n.name == held)
            _check_memory(program.graph, program.graph_signature, str(spec.target), before, result)
    return program


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _pure(node: fx.Node) -> Any:
    """The operator without the underscore."""
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    names = [] if packet is None else sorted(packet.overloads(), key=lambda each: each != overload)
    alike = [o for o in (getattr(packet, each) for each in names) if _takes(o) == _takes(node.target)]
    found = next((o for o in alike if not o._schema.is_mutable), None)
    if found is None:
        raise ModelError(
            f"Layer {layer_of(node)} uses {node.target}, which changes a tensor in place and has no form that does not: "
            "write it as an expression that makes a new tensor.",
            code="operator",
        )
    return found


def _takes(overload: Any) -> list[tuple[str, str]]:
    """Kinds and names of an operator's arguments: `pow_.Scalar` has those of `pow.Tensor_Scalar`, not of `pow.Scalar`."""
    return [(str(a.type), "" if i == 0 else a.name) for i, a in enumerate(overload._schema.arguments)]


@dataclass
class _Rewriting:
    """One pass over a copy of the program.

    Attributes:
        parents: a view → the node whose memory it shows.
        same: views that show the whole of it as it is.
        odd: views made of another argument than the first.
        version: a node with memory of its own → how often it was written.
        now, known: a node → the node that has its content, as of that version.
        who, at: the node that is being rewritten, and the one before which new ones go.
    """

    program: ExportedProgram
    example: Tensor
    parents: dict[fx.Node, fx.Node] = field(default_factory=dict)
    same: set[fx.Node] = field(default_factory=set)
    odd: set[fx.Node] = field(default_factory=set)
    version: dict[fx.Node, int] = field(default_factory=dict)
    now: dict[fx.Node, fx.Node] = field(default_factory=dict)
    known: dict[fx.Node, int] = field(default_factory=dict)

    def run(self) -> ExportedProgram:
        self.module = copy.deepcopy(self.program.graph_module)
        self.graph = self.module.graph
        for theirs, ours in zip(self.program.graph.nodes, self.graph.nodes, strict=True):
            if ours.name != theirs.name:  # a copy renames what is a word of Python, as in forward(self, input)
                ours.name = theirs.name
        self._observe()
        for node in [n for n in self.graph.nodes if n.op != "placeholder"]:
            self.who = self.at = node
            written = node.args[0] if _writes(node) else None
            node.args = fx.map_arg(node.args, self.current)
            node.kwargs = fx.map_arg(node.kwargs, self.current)
            self.known[node] = self.version.get(self.root(node), 0)
            if written is None:
                continue
            if not isinstance(written, fx.Node) or "out" in node.kwargs:
                raise ModelError(
                    f"Layer {layer_of(node)} uses {node.target}, which writes into a tensor handed to it: assign the result "
                    "instead.",
                    code="operator",
                )
            node.target = _pure(node)
            if node.target not in SCATTERS:  # unsqueeze_ and its kin write no number: they are views
                self.at = node.next
                self.write(written, node)
                self.parents[node] = written
                self.same.add(node)
                self.known[node] = self.version[self.root(node)]
        return self._finished()

    def _observe(self) -> None:
        """Fills `parents`, `same` and `odd` from one run."""
        alive: list[Any] = []  # memory that is freed would be given to the next tensor
        storages: dict[fx.Node, set[int]] = {}
        places: dict[fx.Node, list[Any]] = {}
        taken: dict[tuple[fx.Node, Any], fx.Node] = {}

        def note(node: fx.Node, result: Any) -> None:
            alive.append(result)
            tensors = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
            storages[node] = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
            places[node] = [(t.storage_offset(), t.shape, t.stride(), t.dtype) for t in tensors]
            if node.op != "call_function":
                return
            if node.target is operator.getitem and node.args[0] not in self.parents:  # of results with memory of their own
                first = taken.setdefault((node.args[0], node.args[1]), node)  # type: ignore[arg-type]
                if first is not node:
                    self.parents[node] = first
                    self.same.add(node)
                return
            for source in node.all_input_nodes:
                if storages[source] & storages[node]:
                    self.parents[node] = source
                    if source is not node.args[0]:
                        self.odd.add(node)
                    if node.target not in SCATTERS and node.target is not operator.getitem and places[node] == places[source]:
                        self.same.add(node)
                    return

        run_program(self.program, self.example, note, self.module)

    def root(self, node: fx.Node) -> fx.Node:
        while node in self.parents:
            node = self.parents[node]
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """The node that has, at this point of the program, what `node`'s memory holds."""
        version = self.version.get(self.root(node), 0)
        if self.known.get(node, 0) != version:
            held = self.current(self.parents[node])
            if node in self.odd:
                raise _cannot_follow(self.who, node)
            self.now[node] = held if node in self.same else self.emit(node.target, (held, *node.args[1:]), node, node.kwargs)
            self.known[node] = version
        return self.now.get(node, node)

    def write(self, node: fx.Node, value: fx.Node) -> None:
        """`node`'s memory holds `value` from here on, and so does the part of what it is a view of."""
        parent = self.parents.get(node)
        if parent is None:
            self.version[node] = self.version.get(node, 0) + 1
        elif node in self.same:
            self.write(parent, value)
        elif node.target is operator.getitem:
            self.write(self.parents[parent], self._part_put_back(node, parent, value))
        elif node.target in SCATTERS and node not in self.odd:
            self.write(parent, SCATTERS[node.target](self, node, self.current(parent), value))
        else:
            raise _cannot_follow(self.who, node)
        self.now[node], self.known[node] = value, self.version[self.root(node)]

    def _part_put_back(self, part: fx.Node, several: fx.Node, value: fx.Node) -> fx.Node:
        """`value` in the place of one of the parts that split, chunk or unbind made."""
        held, index = self.current(self.parents[several]), part.args[1]
        unbound = several.target == aten.unbind.int
        if not unbound and several.target not in SPLITS:
            raise _cannot_follow(self.who, several)
        at = 1 if unbound else 2
        axis = several.args[at] if len(several.args) > at else several.kwargs.get("dim", 0)
        if unbound:
            return self.emit(aten.select_scatter.default, (held, value, axis, index), held)
        ends = [sum(p.shape[axis] for p in several.meta["val"][:i]) for i in (index, index + 1)]  # type: ignore[operator]
        if not all(isinstance(end, int) for end in ends):
            raise ModelError(f"Layer {layer_of(several)} splits the batch.", code="operator")
        return self.emit(aten.slice_scatter.default, (held, value, axis, *ends), held)

    def emit(self, target: Any, args: tuple[Any, ...], like: fx.Node, kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        """A new node, with a value of the shape `like` has."""
        with self.graph.inserting_before(self.at):
            made: fx.Node = self.graph.call_function(target, args, dict(kwargs or {}))
        made.meta = {k: v for k, v in self.who.meta.items() if k in ("nn_module_stack", "stack_trace")}
        made.meta["val"] = like.meta.get("val")
        return made

    def _finished(self) -> ExportedProgram:
        signature, p = copy.deepcopy(self.program.graph_signature), self.program
        output = next(n for n in self.graph.nodes if n.op == "output")
        for spec, result in zip(signature.output_specs, output.args[0], strict=True):
            if isinstance(result, fx.Node):
                spec.arg.name = result.name
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        for spec, node in zip(signature.input_specs, placeholders, strict=True):
            if spec.kind is not InputKind.USER_INPUT and self.version.get(node):
                _check_memory(self.graph, signature, spec.target or node.name, node, self.now[node])
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
        self.module.recompile()
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=p.state_dict,
            range_constraints=p.range_constraints,
            module_call_graph=p.module_call_graph,
            example_inputs=p.example_inputs,
            constants=p.constants,
        )


def _check_memory(graph: fx.Graph, signature: ExportGraphSignature, name: str, before: fx.Node, after: fx.Node) -> None:
    """Refuses a model that remembers: what one image leaves in a buffer must not reach the answer to the next."""
    output = next(n for n in graph.nodes if n.op == "output")
    answers = [r for r in user_outputs(signature, output.args[0]) if isinstance(r, fx.Node)]
    inputs = {n for n in graph.nodes if n.op == "placeholder" and n.name in signature.user_inputs}
    if before in _ancestors(answers) and inputs & _ancestors([after]):
        raise ModelError(
            f"{name} is changed by every image and the answer depends on it: a model that remembers earlier images cannot be "
            "exported. Take the memory out of forward.",
            code="state",
        )


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found, left = set(nodes), list(nodes)
    while left:
        new = [source for source in left.pop().all_input_nodes if source not in found]
        found.update(new)
        left += new
    return found


def _cannot_follow(writer: fx.Node, view: fx.Node) -> ModelError:
    return ModelError(
        f"Layer {layer_of(writer)} changes in place what {view.target} made, a view that export cannot follow: write it as an "
        "expression that makes a new tensor.",
        code="operator",
    )


def _sizes(like: fx.Node) -> list[int]:
    """The shape of a node's tensor, with -1 for the batch."""
    sizes = [s if isinstance(s, int) else -1 for s in like.meta["val"].shape]
    if sizes.count(-1) > 1:
        raise ModelError(f"Layer {layer_of(like)} spreads the batch over two axes: export cannot follow it.", code="batch")
    return sizes


def _rank(like: fx.Node) -> int:
    return len(like.meta["val"].shape)


def _reshaped(r: _Rewriting, view: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
    return r.emit(aten.reshape.default, (value, _sizes(held)), held)


def _sliced(r: _Rewriting, view: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
    return r.emit(aten.slice_scatter.default, (held, value, *view.args[1:]), held)


def _narrowed(r: _Rewriting, view: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
    axis, start, length = view.args[1:4]
    begin = start % held.meta["val"].shape[axis]
    return r.emit(aten.slice_scatter.default, (held, value, axis, begin, begin + length), held)


def _selected(r: _Rewriting, view: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
    return r.emit(aten.select_scatter.default, (held, value, *view.args[1:]), held)


def _swapped(r: _Rewriting, view: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
    return r.emit(aten.transpose.int, (value, *(view.args[1:] or (-2, -1))), held)


def _permuted(r: _Rewriting, view: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
    axes = [a % _rank(view) for a in view.args[1]]  # type: ignore[union-attr, operator, unused-ignore]
    return r.emit(aten.permute.default, (value, [axes.index(a) for a in range(len(axes))]), held)


def _moved(r: _Rewriting, view: fx.Node, held: fx.Node, value: fx.Node) -> fx.Node:
    source, target = view.args[1:3]
    return r.emit(view.target, (value, target, source), held)


SPLITS = (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default)
SCATTERS: dict[Any, Callable[[_Rewriting, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
            aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
            aten._unsafe_view.default,
        ),
        _reshaped,
    ),
    aten.slice.Tensor: _sliced,
    aten.narrow.default: _narrowed,
    aten.select.int: _selected,
    **dict.fromkeys((aten.transpose.int, aten.swapaxes.default, aten.t.default, aten.mT.default), _swapped),
    aten.permute.default: _permuted,
    **dict.fromkeys((aten.movedim.int, aten.movedim.intlist), _moved),
}  # fmt: skip
