"""The index of a paged model: its geometry, and for each expert the place, bits and digest of its record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from refold.errors import BundleError
from refold.experts.records import ALIGNMENT, BITS

__all__ = ["ExpertIndex", "Geometry", "Record"]

FORMAT = 1


@dataclass(frozen=True)
class Geometry:
    """What all experts of a model share.

    Attributes:
        family: transformers' model_type, as in "mixtral" or "olmoe".
        layers: the decoder layers that have experts, by their number in the model, ascending. Encoder layers of an
            encoder-decoder come first, as negative numbers: encoder block b of n is b - n.
        experts: experts in each of them. top_k: experts that a token uses.
        hidden: width of the residual stream. intermediate: width inside an expert.
        gated: matrices are gate_up (2 intermediate, hidden), gate rows first, and down (hidden, intermediate); otherwise
            up (intermediate, hidden) and down.
        activation: transformers' name of the function, as in "silu".
        group: neighbours along a row that share a scale.
    """

    family: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gated: bool
    activation: str
    group: int

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert, in the order of the records."""
        return [(layer, expert) for layer in self.layers for expert in range(self.experts)]

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of an expert's two matrices."""
        return ((2 if self.gated else 1) * self.intermediate, self.hidden), (self.hidden, self.intermediate)


@dataclass(frozen=True)
class Record:
    """Where one expert lies. offset, size: bytes within records.bin, multiples of 4,096; sha256: of all `size` bytes."""

    layer: int
    expert: int
    bits: int
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class ExpertIndex:
    """All records of a model.

    Attributes:
        frequency: how often each expert was used on the calibration text, by (layer, expert): shares of a layer's tokens,
            0 to 1. Empty where nothing was measured.
    """

    geometry: Geometry
    records: Mapping[tuple[int, int], Record]
    frequency: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def __getitem__(self, key: tuple[int, int]) -> Record:
        return self.records[key]

    @property
    def total(self) -> int:
        """Of all records together."""
        return sum(r.size for r in self)

    @property
    def largest(self) -> int:
        """Bytes of the largest record."""
        return max(r.size for r in self)

    def to_json(self) -> bytes:
        rows = [asdict(r) | {"frequency": self.frequency.get((r.layer, r.expert), 0.0)} for r in self]
        return json.dumps({"format": FORMAT, "geometry": asdict(self.geometry), "records": rows}, indent=None).encode()

    @classmethod
    def from_json(cls, content: bytes, path: str) -> ExpertIndex:
        """Raises BundleError: not an index, of a newer format, or records that are missing, doubled or overlap."""
        try:
            told: dict[str, Any] = json.loads(content)
            if told["format"] > FORMAT:
                raise BundleError(
                    f"The expert index of {path} has format {told['format']}: update Refold.", code="newer-format"
                )
            geometry = Geometry(**told["geometry"] | {"layers": tuple(told["geometry"]["layers"])})
            rows = [
                (Record(**{k: v for k, v in row.items() if k != "frequency"}), float(row["frequency"]))
                for row in told["records"]
            ]
            records = {(r.layer, r.expert): r for r, _ in rows}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise BundleError(f"The expert index of {path} is damaged: copy or export it again.", code="damaged") from e
        wanted = set(geometry.keys)
        if set(records) != wanted or len(rows) != len(wanted):
            raise BundleError(f"The expert index of {path} lacks experts or has some twice: export it again.", code="damaged")
        end = 0
        for r in sorted(records.values(), key=lambda r: r.offset):
            if r.offset < end or r.offset % ALIGNMENT or r.size % ALIGNMENT or r.size <= 0 or r.bits not in BITS:
                raise BundleError(
                    f"The expert index of {path} is damaged at expert {r.expert} of layer {r.layer}: export it again.",
                    code="damaged",
                )
            end = r.offset + r.size
        frequency = {(r.layer, r.expert): f for r, f in rows if f}
        return cls(geometry, records, frequency)


def _record(row: Mapping[str, Any]) -> Record:
    return Record(**{k: v for k, v in row.items() if k != "frequency"})
