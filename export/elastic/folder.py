"""The run folder, all that a training leaves behind and all that search and delivery need:

    settings.json          what was asked for           model.pt2         the captured float model
    checkpoint.pt          every learned number, the optimiser, the losses; tensors only, never unpickled
    configurations/*.json  what a search found          loss.png, search-*.png, result.json, pairs-*.jsonl

Every file is the old or the new one, whatever happens.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from export.capture import capture, load_program
from export.elastic.layout import Layout
from export.elastic.space import Configuration, Space
from export.elastic.supernet import Supernet
from export.ir import Graph
from refold.atomic import check_output, make_directory, write_atomically
from refold.errors import InputError, StorageError, UsageError
from refold.preprocess import Preprocess, Resize

__all__ = ["Checkpoint", "RunFolder", "Settings", "Training", "graph_digest"]

FORMAT = 1
NAMED = re.compile(r"w([2-8])a([2-8])")


@dataclass(frozen=True)
class Training:
    """Numbers of a training; the defaults are EQ-Net's (quant.md §1.2).

    Attributes:
        lam: share of the teacher in a student's loss; subnets: trained in each step, high and low included.
        teacher: the float model teaches the highest subnet on the pictures it is right about.
        kurtosis, skewness: weights of the two terms of the weight distribution regularisation.
        checkpoint_every: steps. calibration: pictures for first steps. statistics: most pictures for norm statistics.
    """

    steps: int
    batch: int = 128
    lr: float = 1e-3
    lam: float = 0.5
    subnets: int = 3
    teacher: bool = True
    kurtosis: float = 0.015
    skewness: float = 1.0
    augment: bool = True
    seed: int = 0
    checkpoint_every: int = 100
    calibration: int = 256
    statistics: int = 2048

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or self.checkpoint_every < 1 or self.calibration < 2:
            raise UsageError("A training has at least 1 step, batches and a calibration of at least 2 pictures.")
        if not 0 < self.lr < 1 or not 0 <= self.lam <= 1 or self.subnets < 2 or min(self.kurtosis, self.skewness) < 0:
            raise UsageError("lr lies between 0 and 1, lam from 0 to 1, subnets is at least 2, regularisation at least 0.")


@dataclass(frozen=True)
class Settings:
    """What a run was asked for. `graph`, `labels`: digests, so that it is not continued with another model or other data."""

    model: str
    data: str
    preprocess: Preprocess
    space: Space
    training: Training
    classes: tuple[str, ...] = ()
    graph: str = ""
    labels: str = ""

    def to_json(self) -> str:
        held = asdict(self)
        held["preprocess"]["resize"] = self.preprocess.resize.name
        return json.dumps({"format": FORMAT, **held}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Raises InputError when the text is no settings file of this version."""
        try:
            held = json.loads(text)
            if held.pop("format") != FORMAT:
                raise ValueError("another format")
            plan = held["preprocess"]
            plan |= {"resize": Resize[plan["resize"]], "mean": tuple(plan["mean"]), "std": tuple(plan["std"])}
            held["preprocess"] = Preprocess(**plan)
            held["space"] = Space(**{k: tuple(v) for k, v in held["space"].items()})
            held["training"] = Training(**held["training"])
            return cls(**{**held, "classes": tuple(held["classes"])})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError("settings.json is damaged or of another version.", code="run", detail=str(e)) from e

    def differing(self, other: Settings) -> list[str]:
        """Names of the settings in which two runs differ; how often to save is not one of them."""
        a, b = (json.loads(s.to_json()) for s in (self, other))
        for one in (a, b):
            one |= one.pop("training")
            del one["checkpoint_every"]
        return [k for k in a if a[k] != b[k]]


@dataclass
class Checkpoint:
    """`step` steps are done; losses: one row for each, the subnets' in order and the regularisation."""

    step: int
    state: Mapping[str, Tensor]
    optimiser: Mapping[str, Any] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    path: Path

    def create(self, settings: Settings, program: ExportedProgram) -> None:
        """Writes settings and model. Raises StorageError when the disk does not take them."""
        try:
            make_directory(self.path / "configurations")
        except OSError as e:
            raise StorageError(f"{self.path} cannot be made: {e.strerror or e}.") from e
        out = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, out)
        write_atomically(self.path / "model.pt2", [out.getvalue()])
        write_atomically(self.path / "settings.json", [settings.to_json().encode()])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other trainings out for as long as this process lives, however it ends.

        Raises:
            UsageError: another process trains in this folder.
            StorageError: the folder cannot be made.
        """
        try:
            make_directory(self.path)
            lock = (self.path / ".lock").open("w")
        except OSError as e:
            raise StorageError(f"{self.path} cannot be made: {e.strerror or e}.") from e
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise UsageError(f"Another process is training in {self.path}: wait for it, or give another folder.") from e
            check_output(self.path / "settings.json")
            yield

    @property
    def started(self) -> bool:
        return (self.path / "checkpoint.pt").is_file()

    def settings(self) -> Settings:
        """Raises InputError when this is no run folder."""
        try:
            return Settings.from_json((self.path / "settings.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(
                f"{self.path} is not the folder of an elastic training: it has no settings.json.", code="run"
            ) from e

    def save(self, checkpoint: Checkpoint) -> None:
        out = io.BytesIO()
        torch.save(
            {
                "format": FORMAT,
                "step": checkpoint.step,
                "state": dict(checkpoint.state),
                "optimiser": checkpoint.optimiser,
                "losses": torch.tensor(checkpoint.losses, dtype=torch.float64),
            },
            out,
        )
        write_atomically(self.path / "checkpoint.pt", [out.getvalue()])

    def checkpoint(self) -> Checkpoint:
        """Raises InputError when there is none or it is damaged."""
        path = self.path / "checkpoint.pt"
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
            if held["format"] != FORMAT:
                raise ValueError("another format")
            return Checkpoint(held["step"], held["state"], held["optimiser"], held["losses"].tolist())
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as e:
            raise InputError(f"{path} is missing or damaged: train again.", code="checkpoint", detail=str(e)) from e

    def digest(self) -> str:
        """Of the checkpoint: what was measured on another supernet is not mixed with this one's."""
        return hashlib.sha256((self.path / "checkpoint.pt").read_bytes()).hexdigest()

    def captured(self) -> tuple[Graph, list[str]]:
        """The float graph, and the names of its parameters."""
        settings = self.settings()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = self.program()
            graph = capture(program, settings.preprocess.height, settings.preprocess.width)
        return graph, list(program.graph_signature.parameters)

    def program(self) -> ExportedProgram:
        return load_program(self.path / "model.pt2")

    def supernet(self) -> Supernet:
        """As the last checkpoint left it."""
        graph, parameters = self.captured()
        return Supernet.restore(graph, self.settings().space, parameters, self.checkpoint().state)

    def configuration(self, name: str, layout: Layout) -> Configuration:
        """`w4a8` (uniform, the space's usual form), the name of a search's result, or the path of a JSON file.

        Raises:
            UsageError: there is nothing of that name, or it is not one of this supernet's.
        """
        space = self.settings().space
        uniform = NAMED.fullmatch(name)
        if uniform:
            return space.uniform(layout, int(uniform[1]), int(uniform[2]))
        path = Path(name) if name.endswith(".json") else self.path / "configurations" / f"{name}.json"
        try:
            found = Configuration.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            known = sorted(p.stem for p in (self.path / "configurations").glob("*.json"))
            raise UsageError(
                f"There is no configuration {name!r}: give w4a8 and the like, a JSON file"
                f"{', or one of ' + ', '.join(known) if known else ''}."
            ) from e
        space.check(layout, found)
        return found

    def keep(self, name: str, configuration: Configuration) -> Path:
        path = self.path / "configurations" / f"{name}.json"
        try:
            make_directory(path.parent)
        except OSError as e:
            raise StorageError(f"{path.parent} cannot be made: {e.strerror or e}.") from e
        write_atomically(path, [configuration.to_json().encode()])
        return path


def graph_digest(graph: Graph) -> str:
    """Of the nodes and every constant."""
    found = hashlib.sha256()
    for node in graph.nodes:
        found.update(repr((node.name, node.op, node.inputs, node.output, sorted(node.parameters.items()))).encode())
    for name in sorted(graph.constants):
        found.update(name.encode() + graph.constants[name].tobytes())
    return found.hexdigest()
