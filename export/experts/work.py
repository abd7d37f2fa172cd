"""The folder `.m.refold.work/` beside the output: what a killed export goes on from.

    lock                 held while an export runs
    settings.json        of which checkpoint, in groups of how many; another one starts anew
    4.records            the records of one width so far, and 4.jsonl, a line for each that is whole
    evaluations.jsonl    a line for each measured assignment of bits

A line is written after what it tells of. On resuming, records are read against the digests in their lines.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from refold.append import append_line
from refold.atomic import make_directory, sync_directory, write_atomically
from refold.errors import RefoldError, StorageError, UsageError
from refold.experts import ALIGNMENT, PagedWriter, Record

__all__ = ["Variant", "Work"]

Key = tuple[int, int]


class Variant:
    """All experts at one width, in the work folder."""

    def __init__(self, path: Path, records: Mapping[Key, Record]) -> None:
        self.path, self.records = path, records

    def read(self, layer: int, expert: int) -> bytes:
        record = self.records[layer, expert]
        try:
            with self.path.open("rb") as f:
                f.seek(ALIGNMENT + record.offset)
                return f.read(record.size)
        except OSError as e:
            raise StorageError(f"{self.path} cannot be read: {e.strerror or e}.") from e


class Work:
    """A context: entered, the folder is this process's alone. Left with an error, the records go and measurements stay, as
    another bound asks for many of them again; killed or interrupted, all of it stays; left well, nothing.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.work")
        self.evaluations: dict[str, float] = {}
        self._settings = json.dumps(settings, sort_keys=True)
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Work:
        try:
            make_directory(self.folder)
            self._lock = (self.folder / "lock").open("wb")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise UsageError(f"Another export writes to {self.folder}: wait for it.", code="busy") from None
            told = self.folder / "settings.json"
            if not told.is_file() or told.read_text(encoding="utf-8") != self._settings:
                self._clear(lambda p: p.name != "lock")
                write_atomically(told, [self._settings.encode()])
            self.evaluations = {row["plan"]: row["loss"] for row in self._lines("evaluations")}
        except OSError as e:
            raise StorageError(f"{self.folder} cannot be used: {e.strerror or e}.") from e
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._lock is not None
        if isinstance(error, RefoldError) and self.evaluations:
            with suppress(OSError):  # the error on its way out is the one to report
                self._clear(lambda p: p.suffix not in (".json", ".jsonl") or p.stem.isdigit())
        elif error is None or isinstance(error, RefoldError):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _clear(self, which: Callable[[Path], bool]) -> None:
        """Raises OSError: something cannot be removed."""
        for path in self.folder.iterdir():
            if which(path):
                path.unlink()

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """All whole lines; what a kill cut off ends the list, and the file."""
        path, out, good = self.folder / f"{name}.jsonl", [], 0
        if not path.is_file():
            return []
        with path.open("rb+") as f:
            for line in f.read().splitlines(keepends=True):
                try:
                    out.append(json.loads(line) if line.endswith(b"\n") else None)
                except ValueError:
                    out.append(None)
                if out[-1] is None:
                    break
                good += len(line)
            f.truncate(good)
        return [row for row in out if row is not None]

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        append_line(self.folder / f"{name}.jsonl", json.dumps(row).encode())

    def note(self, plan: str, loss: float) -> None:
        """Keeps a measurement."""
        self.evaluations[plan] = loss
        self._append("evaluations", {"plan": plan, "loss": loss})

    def written(self, bits: int, make: Callable[[int, int], bytes], keys: list[Key], done: Callable[[], None]) -> PagedWriter:
        """All records of one width: those already there, and the others from `make`. `done` is called for each."""
        name = str(bits)
        try:
            rows = [Record(**row) for row in self._lines(name)]
        except OSError as e:
            raise StorageError(f"{self.folder} cannot be used: {e.strerror or e}.") from e
        writer = PagedWriter.resume(self.folder / f"{name}.records", rows, lambda _: done())
        if [(r.layer, r.expert) for r in writer.records] != keys[: len(writer.records)]:
            writer.close()
            writer = PagedWriter.begin(self.folder / f"{name}.records")
        with writer.closed_on_error():
            kept = [json.dumps(asdict(r)).encode() + b"\n" for r in writer.records]
            write_atomically(self.folder / f"{name}.jsonl", kept)
            for layer, expert in keys[len(kept) :]:
                record = writer.append(layer, expert, bits, make(layer, expert))
                self._append(name, asdict(record))
                done()
        return writer

    def free(self) -> int:
        try:
            return shutil.disk_usage(self.folder).free
        except OSError as e:
            raise StorageError(f"{self.folder} cannot be looked at: {e.strerror or e}.") from e

    def publish(self, name: str, output: Path) -> None:
        """Renames a finished file of the folder to the output."""
        try:
            (self.folder / name).replace(output)
            sync_directory(output.parent)
        except OSError as e:
            raise StorageError(f"{output} cannot be written: {e.strerror or e}.") from e
