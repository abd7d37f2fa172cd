"""transformers' experts modules against the records that take their place (refold/experts/interface.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.integrations import moe

from refold.errors import ModelError
from refold.experts import Geometry, interface

__all__ = ["check_dense", "check_fused"]


def check_fused(module: torch.nn.Module, geometry: Geometry) -> None:
    """Raises ModelError: the module computes something else than its records do."""
    interface.check_fused(module, geometry, moe, _activation(geometry), _probe())


def check_dense(modules: Mapping[str, torch.nn.Module], geometry: Geometry) -> None:
    """The same of experts that are a module each."""
    interface.check_dense(modules, geometry, _activation(geometry), _probe())


def _activation(geometry: Geometry) -> Any:
    try:
        return ACT2FN[geometry.activation]
    except KeyError:
        raise ModelError(f"There is no activation {geometry.activation!r}.", code="experts-interface") from None


def _probe() -> torch.Tensor:
    return torch.linspace(-8, 8, 65, device="cpu")
