"""Resident matrices in the checkpoint's own 16 bits: half the memory of float32, and half the bytes to read for each token.

The numbers are those of the checkpoint, exactly; each is widened to float32 as it is multiplied. Only where the native kernel
is: torch has no fast product of float32 with 16-bit weights on a processor without 16-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edge.experts import kernel
from edge.experts.kernel.crew import Crew
from refold.experts import Tensor as Stored

__all__ = ["FEW", "HalfEmbedding", "HalfLinear", "keep_halves", "place"]

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
FEW = 8  # tokens; more of them pay for weights that are widened first
ROWS = 4096  # widened at a time: 32 MB of 2,048 columns


class HalfLinear(nn.Module):
    """nn.Linear over `half`, float16 or bfloat16 (rows, columns), which is no parameter: transformers takes a model's type
    from those."""

    def __init__(self, half: Tensor, bias: nn.Parameter | None, crew: Crew | None = None) -> None:
        super().__init__()
        self.__dict__["half"], self.__dict__["crew"] = half, crew
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """float32 (..., columns) to (..., rows)."""
        half: Tensor = self.__dict__["half"]
        flat = x.reshape(-1, half.shape[1])
        if len(flat) <= FEW:
            y = kernel.half(half, flat, self.__dict__["crew"])
        else:
            y = torch.cat([flat @ part.float().T for part in torch.split(half, ROWS)], 1)
        y = y.reshape(*x.shape[:-1], half.shape[0])
        return y if self.bias is None else y + self.bias


class HalfEmbedding(nn.Module):
    """nn.Embedding over `half`."""

    def __init__(self, half: Tensor) -> None:
        super().__init__()
        self.__dict__["half"] = half

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) to float32 (..., columns)."""
        return nn.functional.embedding(ids, self.__dict__["half"]).float()


def keep_halves(
    model: PreTrainedModel, name: str, tensor: Stored, wide: Collection[nn.Module] = (), crew: Crew | None = None
) -> bool:
    """Puts a stored matrix in place of the linear layer or embedding it belongs to.

    Args:
        name: as in the model's state dict. wide: layers whose weights somebody else reads. crew: threads that share its rows.

    Returns:
        False: it is no 16-bit matrix of such a layer, or its shape is another one; nothing was done.
    """
    owner_name, _, last = name.rpartition(".")
    if tensor.dtype not in TYPES or last != "weight":
        return False
    owner = dict(model.named_modules()).get(owner_name)
    if owner is None or type(owner) not in (nn.Linear, nn.Embedding) or owner in wide or owner.weight.shape != tensor.shape:
        return False
    half = torch.frombuffer(bytearray(tensor.data), dtype=TYPES[tensor.dtype]).reshape(tensor.shape)
    place(model, owner_name, HalfEmbedding(half) if isinstance(owner, nn.Embedding) else HalfLinear(half, owner.bias, crew))
    return True


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module where another one was."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
