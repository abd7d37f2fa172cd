"""What may be chosen: bits, granularity and symmetry of every layer's weights and every value's codes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from export.elastic.layout import Layout
from refold.errors import UsageError

__all__ = ["PINNED", "ActivationForm", "Configuration", "Form", "Space", "WeightForm", "bit_operations", "byte_count"]

PINNED = 8
FORMAT = 1
SCALE_BYTES, ZERO_POINT_BYTES = 4, 1


def _check_bits(bits: object) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise UsageError(f"A bit-width is a whole number from 2 to 8, not {bits!r}.")


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if type(value) is not bool:
            raise UsageError(f"{name} is true or false, not {value!r}.")


@dataclass(frozen=True)
class WeightForm:
    """How one layer's weights are quantised."""

    bits: int
    per_channel: bool
    symmetric: bool

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_flags(per_channel=self.per_channel, symmetric=self.symmetric)


@dataclass(frozen=True)
class ActivationForm:
    """How one value is quantised: always one scale for the whole of it."""

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_flags(symmetric=self.symmetric)


@dataclass(frozen=True)
class Form:
    """Granularity and symmetry of a whole network: what a search holds in common."""

    per_channel: bool = True
    weight_symmetric: bool = True
    activation_symmetric: bool = False

    def __str__(self) -> str:
        weights = "symmetric" if self.weight_symmetric else "asymmetric"
        values = "symmetric" if self.activation_symmetric else "asymmetric"
        return f"{'per-channel' if self.per_channel else 'per-tensor'} w-{weights} a-{values}"


@dataclass(frozen=True)
class Configuration:
    """One network of the supernet: a form for each integer layer (by its name) and for each scaled value, in layout order."""

    weights: tuple[tuple[str, WeightForm], ...]
    activations: tuple[tuple[str, ActivationForm], ...]

    @cached_property
    def weight(self) -> Mapping[str, WeightForm]:
        return dict(self.weights)

    @cached_property
    def activation(self) -> Mapping[str, ActivationForm]:
        return dict(self.activations)

    @property
    def form(self) -> Form | None:
        """The form all its parts share, or None."""
        shared = {Form(w.per_channel, w.symmetric, a.symmetric) for _, w in self.weights for _, a in self.activations}
        return shared.pop() if len(shared) == 1 else None

    def to_json(self) -> str:
        parts = {
            "weights": {name: asdict(form) for name, form in self.weights},
            "activations": {name: asdict(form) for name, form in self.activations},
        }
        return json.dumps({"format": FORMAT, **parts}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Configuration:
        """Raises UsageError saying what is wrong with the text."""
        try:
            held = json.loads(text)
        except ValueError as e:
            raise UsageError(f"A configuration is JSON; this is not: {e}.") from e
        if not isinstance(held, dict) or held.get("format") != FORMAT or set(held) != {"format", "weights", "activations"}:
            raise UsageError(f'A configuration is a table with "format": {FORMAT}, "weights" and "activations".')
        weights = _forms(held["weights"], WeightForm, "weights")
        return cls(weights, _forms(held["activations"], ActivationForm, "activations"))


def _forms(held: Any, kind: Any, what: str) -> tuple[tuple[str, Any], ...]:
    if not isinstance(held, dict):
        raise UsageError(f"The {what} of a configuration are a table of names.")
    fields = set(kind.__dataclass_fields__)
    for name, row in held.items():
        if not isinstance(row, dict) or set(row) != fields:
            raise UsageError(
                f"{what} of {name} in a configuration are {', '.join(sorted(fields))}; nothing else, nothing less."
            )
    return tuple((name, kind(**row)) for name, row in held.items())


@dataclass(frozen=True)
class Space:
    """What every elastic layer and value may choose from; bits ascending, True first where both are allowed.

    Attributes:
        granularities: True: a step for each output channel; False: one for the tensor.
        weight_symmetries, activation_symmetries: True: symmetric.
    """

    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    granularities: tuple[bool, ...] = (True, False)
    weight_symmetries: tuple[bool, ...] = (True, False)
    activation_symmetries: tuple[bool, ...] = (True, False)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            for b in bits:
                _check_bits(b)
            if not bits or list(bits) != sorted(set(bits)):
                raise UsageError(f"{name} must name at least one width, each once, the smallest first.")
        for name in ("granularities", "weight_symmetries", "activation_symmetries"):
            if getattr(self, name) not in ((True,), (False,), (True, False)):
                raise UsageError(f"{name} must be (True,), (False,) or (True, False).")

    @classmethod
    def parse(cls, text: str) -> Space:
        """The short form of the command line: `w2-8,a3/4/8,per-channel,w-symmetric,a-asymmetric`; what is not said is elastic.

        Raises:
            UsageError: a part that is not known.
        """
        held: dict[str, Any] = {}
        switches = {
            "per-channel": ("granularities", True),
            "per-tensor": ("granularities", False),
            "w-symmetric": ("weight_symmetries", True),
            "w-asymmetric": ("weight_symmetries", False),
            "a-symmetric": ("activation_symmetries", True),
            "a-asymmetric": ("activation_symmetries", False),
        }
        for part in filter(None, (p.strip() for p in text.split(","))):
            if part in switches:
                name, value = switches[part]
                held[name] = tuple(sorted({value, *held.get(name, ())}, reverse=True))
            elif part[0] in "wa" and (bits := _bits(part[1:])):
                held["weight_bits" if part[0] == "w" else "activation_bits"] = bits
            else:
                raise UsageError(f"--elastic: {part!r} is neither bits (w2-8, a4, a2/4/8) nor one of {', '.join(switches)}.")
        return cls(**held)

    def forms(self) -> list[Form]:
        kinds = itertools.product(self.granularities, self.weight_symmetries, self.activation_symmetries)
        return [Form(*kind) for kind in kinds]

    @property
    def form(self) -> Form:
        """The usual one: per channel, symmetric weights, asymmetric activations, as far as the space has them."""
        return Form(self.granularities[0], self.weight_symmetries[0], self.activation_symmetries[-1])

    def assemble(self, layout: Layout, form: Form, weight_bits: Sequence[int], activation_bits: Sequence[int]) -> Configuration:
        """Args:
            weight_bits, activation_bits: of the elastic layers and values, in order.
        """  # fmt: skip
        w, a = iter(weight_bits), iter(activation_bits)
        return Configuration(
            tuple(
                (p.name, WeightForm(PINNED if p.pinned else int(next(w)), form.per_channel, form.weight_symmetric))
                for p in layout.layers
            ),
            tuple(
                (p.name, ActivationForm(PINNED if p.pinned else int(next(a)), form.activation_symmetric)) for p in layout.values
            ),
        )

    def uniform(self, layout: Layout, weight_bits: int, activation_bits: int, form: Form | None = None) -> Configuration:
        """The same bits everywhere but at the pinned places. Raises UsageError where the space lacks them."""
        found = self.assemble(
            layout,
            form or self.form,
            [weight_bits] * len(layout.elastic_layers),
            [activation_bits] * len(layout.elastic_values),
        )
        self.check(layout, found)
        return found

    def draw(self, layout: Layout, rng: np.random.Generator, bits: str = "random") -> Configuration:
        """Granularity and symmetry at random, part by part, and bits: "max", "min", or "random" as well (quant.md §1.2)."""

        def width(choices: tuple[int, ...], pinned: bool) -> int:
            if pinned:
                return PINNED
            return choices[-1] if bits == "max" else choices[0] if bits == "min" else int(rng.choice(choices))

        def flag(choices: tuple[bool, ...]) -> bool:
            return bool(rng.choice(choices))

        weights = tuple(
            (
                p.name,
                WeightForm(width(self.weight_bits, p.pinned), flag(self.granularities), flag(self.weight_symmetries)),
            )
            for p in layout.layers
        )
        activations = tuple(
            (p.name, ActivationForm(width(self.activation_bits, p.pinned), flag(self.activation_symmetries)))
            for p in layout.values
        )
        return Configuration(weights, activations)

    def check(self, layout: Layout, configuration: Configuration) -> None:
        """Raises UsageError unless the configuration is one of this space, for this network."""
        for names, places, what in (
            ([n for n, _ in configuration.weights], layout.layers, "layers"),
            ([n for n, _ in configuration.activations], layout.values, "values"),
        ):
            wanted = [p.name for p in places]
            if sorted(names) != sorted(wanted):
                odd = next(iter(set(names) ^ set(wanted)), names[0])
                raise UsageError(f"The configuration is not one of this network: its {what} differ ({odd}).")
        for p in layout.layers:
            form = configuration.weight[p.name]
            self._check_one(p.name, form.bits, self.weight_bits, p.pinned)
            if form.per_channel not in self.granularities or form.symmetric not in self.weight_symmetries:
                raise UsageError(f"The supernet was not trained with this granularity or symmetry of {p.name}'s weights.")
        for v in layout.values:
            chosen = configuration.activation[v.name]
            self._check_one(v.name, chosen.bits, self.activation_bits, v.pinned)
            if chosen.symmetric not in self.activation_symmetries:
                raise UsageError(f"The supernet was not trained with this symmetry of {v.name}.")

    @staticmethod
    def _check_one(name: str, bits: int, choices: Iterable[int], pinned: bool) -> None:
        if pinned and bits != PINNED:
            raise UsageError(f"{name} stays at {PINNED} bits in every configuration, not {bits}.")
        if not pinned and bits not in choices:
            raise UsageError(f"The supernet was trained with {', '.join(map(str, choices))} bits for {name}, not {bits}.")


def _bits(text: str) -> tuple[int, ...]:
    low, dash, high = text.partition("-")
    if dash and low.isdigit() and high.isdigit():
        return tuple(range(int(low), int(high) + 1))
    parts = text.split("/")
    return tuple(sorted({int(p) for p in parts})) if all(p.isdigit() for p in parts) else ()


def byte_count(layout: Layout, configuration: Configuration) -> int:
    """Bytes of what a configuration ships: weights packed to their bits, steps, zero points, norms and float constants."""
    total = layout.other_bytes + len(layout.values) * (SCALE_BYTES + ZERO_POINT_BYTES)
    for p in layout.layers:
        form = configuration.weight[p.name]
        each = SCALE_BYTES + (0 if form.symmetric else ZERO_POINT_BYTES)
        total += -(-p.elements * form.bits // 8) + each * (p.channels if form.per_channel else 1)
    return total


def bit_operations(layout: Layout, configuration: Configuration) -> int:
    """Multiplications of one picture, each counted as (bits of the weight) x (bits of the input)."""
    return sum(
        p.multiplications * configuration.weight[p.name].bits * configuration.activation[p.source].bits for p in layout.layers
    )
