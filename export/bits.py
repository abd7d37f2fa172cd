"""How many bits each layer's weights and each activation get, before anything is trained or measured.

    w4a8              4-bit weights, 8-bit activations
    w4                the same: what is not named keeps 8
    layer3.*=w2a4     the layers that fit, by name; the last line that fits a layer wins

The first and the last integer layer keep 8 bits unless a line names them: they cost few bytes and most of the accuracy
(EQ-Net, ICCV 2023, pins them too). An activation's bits are those of the layer that makes it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from export.ir import Graph
from export.placement import Placement, is_integer_layer
from refold.errors import UsageError

__all__ = ["EIGHT", "BitPlan", "Bits", "glob_of", "parse_bits", "plan_of"]

WORD = re.compile(r"^(?:w([2-8]))?(?:a([2-8]))?$")


@dataclass(frozen=True)
class Bits:
    """Of weights and of activations, 2 to 8; None leaves what an earlier line said."""

    weights: int | None = None
    activations: int | None = None


@dataclass(frozen=True)
class BitPlan:
    """`overall` for every layer but the first and the last, then `lines`: (glob of layer names, bits)."""

    overall: Bits = Bits()
    lines: tuple[tuple[str, Bits], ...] = ()

    def weight_bits(self, graph: Graph, placement: Placement) -> dict[str, int]:
        """By output of every integer conv and linear layer."""
        found = self._found(graph, placement)
        return {n.output: found[n.output].weights or 8 for n in graph.nodes if is_integer_layer(placement, n)}

    def levels(self, graph: Graph, placement: Placement) -> dict[str, int]:
        """Codes of every value with a scale of its own that has fewer than 256."""
        found = self._found(graph, placement)
        bits = {v: found[v].activations or 8 for v in placement.scaled if v in found}
        return {v: 2**b for v, b in bits.items() if b < 8}

    def over(self, other: BitPlan) -> BitPlan:
        """This plan where it speaks, else the other: weights of a search under the activations a person asked for."""
        overall = Bits(self.overall.weights or other.overall.weights, self.overall.activations or other.overall.activations)
        return BitPlan(overall, (*other.lines, *self.lines))

    def check(self, graph: Graph) -> None:
        """Raises UsageError when a line fits no layer."""
        names = [n.name for n in graph.nodes]
        for glob, _ in self.lines:
            if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                raise UsageError(f"--bits {glob!r} fits no layer; the layers are named as in the model, e.g. {names[0]}.")

    def _found(self, graph: Graph, placement: Placement) -> dict[str, Bits]:
        layers = [n for n in graph.nodes if is_integer_layer(placement, n)]
        pinned = {layers[0].output, layers[-1].output} if layers else set()
        found = {}
        for node in graph.nodes:
            bits = Bits() if node.output in pinned else self.overall
            for glob, line in self.lines:
                if fnmatch.fnmatchcase(node.name, glob):
                    bits = Bits(line.weights or bits.weights, line.activations or bits.activations)
            found[node.output] = bits
        return found


EIGHT = BitPlan()


def parse_bits(words: Sequence[str]) -> BitPlan:
    """The values of --bits. Raises UsageError."""
    overall, lines = Bits(), []
    for word in words:
        glob, _, form = word.rpartition("=")
        match = WORD.match(form)
        if not form or match is None:
            raise UsageError(f"--bits {word!r} is not a form: write w4, w4a6 or LAYERS=w4a6, with 2 to 8 bits.")
        bits = Bits(*(int(g) if g else None for g in match.groups()))
        if glob:
            lines.append((glob, bits))
        else:
            overall = Bits(bits.weights or overall.weights, bits.activations or overall.activations)
    return BitPlan(overall, tuple(lines))


def plan_of(weights: Mapping[str, int], activations: Mapping[str, int] | None = None) -> BitPlan:
    """A plan that says for every layer, by name, what it gets."""
    activations = activations or {}
    names = dict.fromkeys([*weights, *activations])
    return BitPlan(lines=tuple((glob_of(n), Bits(weights.get(n), activations.get(n))) for n in names))


def glob_of(name: str) -> str:
    """A pattern that fits this name and no other."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
