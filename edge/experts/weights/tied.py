"""Which embeddings share a tensor.

The configuration's `tie_word_embeddings` says which names belong together; what was stored decides whether they really do, by
the rule of transformers' `PreTrainedModel.tie_weights` on loading: two stored tensors that differ stay two, one that was not
stored is the other.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edge.experts.kernel.crew import Crew
from edge.experts.model_halves import ROWS, HalfEmbedding, HalfLinear, place

__all__ = ["tie"]


def tie(model: PreTrainedModel, given: Collection[str], crew: Crew | None = None) -> None:
    """Gives every tied name that was not stored the tensor of one that was.

    Args:
        model: all of its stored tensors are in place. given: their names in its state dict.
        crew: threads of a 16-bit matrix that becomes a head.
    """
    pairs = dict(model.all_tied_weights_keys)
    for target, source in pairs.items():
        there = [name for name in (source, target) if name in given]
        if len(there) == 2 and not _equal(_held(model, source), _held(model, target)):
            model.all_tied_weights_keys.pop(target)
            continue
        if not there:  # another name of the same tensor may have been stored
            there = [name for name, of in pairs.items() if of == source and name in given]
        if there:
            for name in (source, target):
                if name != there[0]:
                    _share(model, there[0], name, crew)


def _owner(model: PreTrainedModel, name: str) -> nn.Module:
    owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
    return owner


def _held(model: PreTrainedModel, name: str) -> Tensor:
    owner = _owner(model, name)
    half: Tensor | None = owner.__dict__.get("half")
    return half if half is not None else getattr(owner, name.rpartition(".")[2])


def _equal(a: Tensor, b: Tensor) -> bool:
    """Number by number; a block of rows at a time where the types differ."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    blocks = zip(torch.split(a, ROWS), torch.split(b, ROWS), strict=True)
    return all(torch.equal(p.float(), q.float()) for p, q in blocks)


def _share(model: PreTrainedModel, source: str, target: str, crew: Crew | None) -> None:
    held, owner = _held(model, source), _owner(model, target)
    if "half" not in _owner(model, source).__dict__:
        setattr(owner, target.rpartition(".")[2], held)
    elif isinstance(owner, (nn.Embedding, HalfEmbedding)):
        place(model, target.rpartition(".")[0], HalfEmbedding(held))
    else:
        place(model, target.rpartition(".")[0], HalfLinear(held, owner.bias, crew))  # type: ignore[arg-type]
