"""Weights from a file into a module: `.npz`, `.safetensors` or a torch checkpoint read with weights_only. Never a pickle."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from refold.errors import InputError

__all__ = ["load_weights", "read_weights"]

KERAS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
}
WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "ema", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name to tensor. Raises InputError when the file is absent, damaged, or would need unpickling of arbitrary objects."""
    if not path.is_file():
        raise InputError(f"There is no weights file at {path}.", code="no-weights")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as f, np.load(f, allow_pickle=False) as archive:
                return {k: torch.from_numpy(np.array(archive[k])) for k in archive.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise InputError(
            f"The weights {path} hold more than tensors, and Refold never unpickles objects. Save the state dict alone: "
            "torch.save(model.state_dict(), path), or use safetensors.",
            code="pickle",
            detail=str(e),
        ) from e
    except Exception as e:  # each reader has its own family of errors for a damaged file
        detail = e.strerror if isinstance(e, OSError) and e.strerror else type(e).__name__
        kind = " (a zip that is cut off?)" if isinstance(e, zipfile.BadZipFile) else ""
        raise InputError(f"The weights {path} cannot be read: {detail}{kind}.", code="weights", detail=str(e)) from e
    return _unwrap(content, path)


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    for _ in range(3):
        if isinstance(content, Mapping) and not any(isinstance(v, Tensor) for v in content.values()):
            inner = next((content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)), None)
            if inner is not None:
                content = inner
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no state dict: save model.state_dict().", code="weights")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def load_weights(module: nn.Module, path: Path) -> None:
    """Fills every parameter and buffer of `module`.

    Raises:
        InputError: names are missing or left over, shapes differ (the first few are named), or a value is NaN or infinite.
    """
    wanted = module.state_dict()
    given = _renamed(read_weights(path), set(wanted))
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in wanted and not k.endswith("num_batches_tracked")]
    wrong = [
        f"{k} is {tuple(given[k].shape)} in the file and {tuple(wanted[k].shape)} in the model"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    complaints = [
        *([f"the file lacks {_first(missing)}"] if missing else []),
        *([f"the model lacks {_first(extra)}"] if extra else []),
        *wrong[:3],
    ]
    if complaints:
        raise InputError(f"The weights {path} do not fit the model: {'; '.join(complaints)}.", code="weights-do-not-fit")
    with torch.no_grad():
        module.load_state_dict({k: given.get(k, v).to(v.dtype) for k, v in wanted.items()})


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _renamed(given: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Takes off the prefixes that wrappers leave, and turns Keras's leaf names into torch's, where that makes names fit."""
    for prefix in PREFIXES:
        if given and all(k.startswith(prefix) for k in given) and not wanted & set(given):
            given = {k.removeprefix(prefix): v for k, v in given.items()}
    out = {}
    for name, tensor in given.items():
        stem, _, leaf = name.rpartition(".")
        torch_name = f"{stem}.{KERAS[leaf]}" if name not in wanted and leaf in KERAS else name
        out[torch_name] = tensor
    return out
