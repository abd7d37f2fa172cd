"""From a checkpoint to a paged bundle.

    Source.open ──► records of each width needed ──► search (text, tolerance or size) ──► one file ──► renamed into place
                    in the work folder               measured model reads the records

A uniform width writes its records into what becomes the bundle; a mixture copies them from the widths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from export.experts.choose import Judge, choose
from export.experts.measure import Measure
from export.experts.report import Searched, Told, heat_map
from export.experts.source import Source
from export.experts.tokens import Windows, bytes_as_tokens, windows_of
from export.experts.work import Variant, Work
from refold.atomic import check_output
from refold.errors import StorageError, UsageError
from refold.experts import BITS, PagedModel, PagedWriter, Rest, encode, record_bytes
from refold.signing import SigningKey

__all__ = ["MIXED", "Options", "Watcher", "export_experts"]

MIXED = "mixed"
ROOM = 64 << 20  # bytes of disk beyond the records and the resident part
Key = tuple[int, int]
Plan = Mapping[Key, int]


@dataclass(frozen=True)
class Options:
    """Attributes:
    bits: 8, 4, 2 or MIXED. group: neighbours that share a scale; None: 64, or 32 where widths are no multiples of 64.
    texts: calibration. windows, length: how many pieces of it, of how many predicted tokens.
    tolerance: largest rise of perplexity, as a share; or size: largest number of bytes of all records.
    importance: "loss" (each expert's, over the whole model) or "output" (of its layer, one pass for all experts).
    cache_bytes: of dequantised experts while measuring.
    unused: tensors that the model has no place for are left out; otherwise they refuse the export.
    """

    bits: int | str = 4
    group: int | None = None
    texts: Sequence[Path] = ()
    windows: int = 128
    length: int = 128
    tolerance: float | None = None
    size: int | None = None
    importance: str = "loss"
    cache_bytes: int = 1 << 30
    threads: int = 1
    name: str = ""
    unused: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (*BITS, MIXED):
            raise UsageError(f"--bits is 8, 4, 2 or mixed, not {self.bits}.")
        if self.searches and not self.texts:
            raise UsageError("Bits are chosen by what they cost on a text: give one with --text.")
        if self.tolerance is not None and self.size is not None:
            raise UsageError("Give either --max-perplexity-increase or --size: one follows from the other.")
        if self.tolerance is not None and not 0 < self.tolerance < 10:
            raise UsageError(f"--max-perplexity-increase is a share such as 1%, not {self.tolerance:g}.")
        if self.searches and self.bits != MIXED:
            raise UsageError("--max-perplexity-increase and --size choose the bits: leave --bits out, or say --bits mixed.")
        if self.bits == MIXED and self.tolerance is None and self.size is None:
            raise UsageError("--bits mixed needs a bound: --max-perplexity-increase 1%, or --size 2GB.")
        if self.windows < 1 or self.length < 2:
            raise UsageError("At least one window of two tokens is measured.")

    @property
    def searches(self) -> bool:
        return self.tolerance is not None or self.size is not None or self.bits == MIXED


@dataclass
class Watcher:
    """Hears what is going on: stage(what, steps) begins something, step(n) goes on in it."""

    stage: Callable[[str, int], None] = lambda _what, _steps: None
    step: Callable[[int], None] = lambda _n: None


@dataclass
class _Run:
    source: Source
    options: Options
    work: Work
    watch: Watcher
    variants: dict[int, Variant] = field(default_factory=dict)

    def size(self, bits: int) -> int:
        g = self.source.geometry
        return record_bytes(g.shapes, bits, g.group)

    def quantise(self, bits: int) -> PagedWriter:
        """The records of one width, in the work folder; the writer is at their end."""
        g, keys = self.source.geometry, self.source.order
        self.watch.stage(f"quantising to {bits} bits", len(keys))

        def make(layer: int, expert: int) -> bytes:
            return encode(layer, expert, self.source.quantised(layer, expert, bits, self.options.threads))

        writer = self.work.written(bits, make, keys, lambda: self.watch.step(1))
        self.variants[bits] = Variant(writer.path, {(r.layer, r.expert): r for r in writer.records})
        assert all(r.size == self.size(bits) for r in writer.records), g
        return writer

    def measure(self, windows: Windows) -> Measure:
        self.watch.stage("building the model to measure with", 1)
        return Measure(self.source, self.variants, windows, self.options.cache_bytes, self.watch.step)


def export_experts(
    folder: Path, output: Path, options: Options, *keys: SigningKey, watch: Watcher | None = None, picture: Path | None = None
) -> Told:
    """Writes `output`, and the heat-map where a `picture` is named.

    Raises:
        InputError: the checkpoint or text cannot be used. ModelError: not supported, or the tolerance cannot be met.
        StorageError: disk full. UsageError: options that contradict each other, or another export at work.
    """
    started, watch = time.monotonic(), watch or Watcher()
    if not output.parent.is_dir():
        raise StorageError(f"{output} cannot be written: there is no folder {output.parent}.")
    check_output(output)
    watch.stage("reading the checkpoint's headers", 1)
    source = Source.open(folder, options.group, options.unused)
    source.checkpoint.generation_files()  # a fault is told now, not after hours
    windows = windows_of(source.checkpoint, options.texts, options.length, options.windows) if options.texts else None
    least = len(source.order) * record_bytes(source.geometry.shapes, min(BITS), source.geometry.group)
    if options.size is not None and options.size < least:
        raise UsageError(f"The experts take {least:,} bytes at 2 bits; --size is {options.size:,}.", code="budget")
    settings = {"format": 1, "checkpoint": source.checkpoint.fingerprint(), "group": source.geometry.group}
    with Work(output, settings) as work:
        run = _Run(source, options, work, watch)
        _check_room(run)
        searched: Searched | None = None
        if options.searches:
            assert windows is not None
            writer, plan, measured, frequency, searched = _mixed(run, windows)
        else:
            assert isinstance(options.bits, int)
            writer = run.quantise(options.bits)
            plan = dict.fromkeys(source.order, options.bits)
            with writer.closed_on_error():
                measured, frequency = _uniform(run, windows, plan)
        watch.stage("writing the resident part", 1)
        with writer.closed_on_error():
            files = source.checkpoint.tokenizer_files() | source.checkpoint.generation_files()
            rest = Rest(
                name=options.name or output.stem, config=source.checkpoint.config, resident=source.resident,
                tokenizer=files, bytes_as_tokens=bytes_as_tokens(source.checkpoint),
                norms=source.norms(), frequency=frequency, measured=measured,
            )  # fmt: skip
            writer.finish(source.geometry, rest, *keys)
        work.publish(writer.path.name, output)
    bundle = PagedModel.open(output).bundle
    if picture is not None:
        heat_map(picture, plan, frequency)
    shards = {file for file, _ in source.checkpoint.places.values()}
    told = bundle.manifest.experts
    return Told(
        output, bundle.digest, bundle.size, plan, told.record_bytes, told.resident_bytes, sum(f.stat().st_size for f in shards),
        time.monotonic() - started, measured.get("perplexity"), measured.get("perplexity_before"), frequency, searched,
        _warnings(source), picture,
    )  # fmt: skip


def _warnings(source: Source) -> list[str]:
    out = [*source.notes, *source.checkpoint.generation_notes()]
    if not source.checkpoint.tokenizer_files() and not bytes_as_tokens(source.checkpoint):
        out.append("The checkpoint has no tokenizer: the bundle takes and gives token numbers, not text.")
    return out


def _check_room(run: _Run) -> None:
    """Asks for the disk before hours are spent. Raises StorageError."""
    count = len(run.source.order)
    widths = BITS if run.options.searches else (run.options.bits,)
    most = [run.size(b) for b in widths if isinstance(b, int)]
    there = sum(f.stat().st_size for f in run.work.folder.glob("*.records"))
    wanted = count * (sum(most) + (max(most) if len(most) > 1 else 0)) + sum(t.size for t in run.source.resident) + ROOM
    if wanted - there > run.work.free():
        raise StorageError(
            f"{run.work.folder.parent} has {run.work.free():,} bytes free; this export needs {wanted - there:,}. "
            "Free some space or write elsewhere.",
            code="no-room",
        )


def _uniform(run: _Run, windows: Windows | None, plan: Plan) -> tuple[dict[str, float], dict[Key, float]]:
    if windows is None:
        return {}, {}
    measure = run.measure(windows)
    losses = []
    for what, wanted in (("the checkpoint", {}), (f"{run.options.bits} bits", plan)):
        run.watch.stage(f"measuring {what}", len(windows.ids))
        losses.append(measure.loss(wanted))
    return _measured(losses[1], losses[0], windows), measure.frequency()


def _measured(loss: float, original: float, windows: Windows) -> dict[str, float]:
    return {"perplexity": math.exp(loss), "perplexity_before": math.exp(original), "tokens": float(windows.predicted)}


def _mixed(run: _Run, windows: Windows) -> tuple[PagedWriter, dict[Key, int], dict[str, float], dict[Key, float], Searched]:
    for bits in BITS:
        run.quantise(bits).close()
    judge = Judge(run.measure(windows), windows, run.work, run.watch.stage)
    searched, frequency = choose(judge, {b: run.size(b) for b in BITS}, run.options)
    taken = next(o for o in searched.outcomes if o.name == searched.taken)
    plan = {k: taken.plan[k] for k in run.source.order}
    run.watch.stage("putting the records together", len(plan))
    writer = PagedWriter.begin(run.work.folder / "mixed.refold")
    with writer.closed_on_error():
        for (layer, expert), bits in plan.items():
            writer.append(layer, expert, bits, run.variants[bits].read(layer, expert))
            run.watch.step(1)
    return writer, plan, _measured(taken.loss, searched.original, windows), frequency, searched
