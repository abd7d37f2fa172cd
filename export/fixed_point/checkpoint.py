"""A training on disk: one file, either the old or the new one, from which it goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from export.fixed_point.number import FixedPoint
from export.fixed_point.precision import Strategy
from export.fixed_point.report import Costs
from export.fixed_point.train import Epoch, Plateau, State, Trainer
from refold.atomic import write_atomically
from refold.errors import InputError, StorageError, UsageError

__all__ = ["fingerprint", "resume", "save"]

FORMAT = 1


def fingerprint(trainer: Trainer) -> str:
    """SHA-256 over the model at the start, the settings, the preprocessing and the pictures: what a checkpoint belongs to."""
    if not trainer.identity:
        trainer.identity = _digest(trainer)
    return trainer.identity


def _digest(trainer: Trainer) -> str:
    digest = hashlib.sha256(json.dumps(trainer.settings.encode(), sort_keys=True).encode())
    digest.update(repr(trainer.preprocess).encode())
    for name, value in sorted(trainer.network.captured.constants.items()):
        digest.update(f"{name}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    held_out = trainer.held_out or ()
    for array in (trainer.images, trainer.labels, *held_out):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save(trainer: Trainer, path: Path) -> None:
    """Raises StorageError when the disk is full or not writable; an earlier checkpoint is then untouched."""
    net, state = trainer.network, trainer.state
    tensors = {
        "master": net.master,
        "quantised": {n: t.detach() for n, t in net.quantised.items()},
        "statistics": net.statistics,
        "velocity": trainer.velocity,
        "total": {n: w.total for n, w in trainer.watches.items()},
    }
    rest = {
        "format": FORMAT,
        "fingerprint": fingerprint(trainer),
        "state": dataclasses.asdict(state),
        "plateau": dataclasses.asdict(trainer.plateau),
        "forms": {n: dataclasses.astuple(f) for n, f in net.forms.items()},
        "values": {n: dataclasses.astuple(f) for n, f in net.values.items()},
        "watches": {n: (w.count, w.lookback, w.resolution, w.nonzero) for n, w in trainer.watches.items()},
    }
    out = io.BytesIO()
    torch.save({"tensors": tensors, "rest": json.dumps(rest)}, out)
    write_atomically(path, [out.getvalue()])


def resume(trainer: Trainer, path: Path) -> None:
    """Puts a fresh trainer where the checkpoint left off.

    Raises:
        InputError: the file is not a checkpoint of this version, or damaged.
        StorageError: it cannot be read.
        UsageError: it belongs to another model, other pictures or other settings.
    """
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        tensors, rest = content["tensors"], json.loads(content["rest"])
        known = rest["format"] == FORMAT
    except OSError as e:
        raise StorageError(f"The checkpoint {path} cannot be read: {e.strerror or e}.") from e
    except Exception as e:  # torch's reader raises many kinds for a file that is none of its own
        raise InputError(
            f"{path} is not a checkpoint of a fixed-point training, or damaged. Delete it to start again.",
            code="checkpoint",
            detail=str(e),
        ) from e
    if not known or rest["fingerprint"] != fingerprint(trainer):
        raise UsageError(
            f"The checkpoint {path} belongs to another training: the model, the pictures, the settings or the version differ. "
            "Give them as before, or name another file.",
            code="checkpoint",
        )
    net = trainer.network
    for name in net.master:
        net.master[name] = tensors["master"][name]
        net.quantised[name] = tensors["quantised"][name].requires_grad_()
        trainer.velocity[name] = tensors["velocity"][name]
    net.statistics.update(tensors["statistics"])
    net.forms = {n: FixedPoint(*f) for n, f in rest["forms"].items()}
    net.values = {n: FixedPoint(*f) for n, f in rest["values"].items()}
    for name, (count, lookback, resolution, nonzero) in rest["watches"].items():
        watch = trainer.watches[name]
        watch.total, watch.count, watch.lookback = tensors["total"][name], count, lookback
        watch.resolution, watch.nonzero = resolution, nonzero
    trainer.plateau = Plateau(**rest["plateau"])
    state = rest["state"]
    trainer.state = State(
        state["step"], Strategy(state["strategy"]), state["losses"], [Epoch(**e) for e in state["epochs"]], state["switches"],
        Costs(**state["costs"]),
    )  # fmt: skip
