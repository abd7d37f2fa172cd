"""A checkpoint against its own config.json: what contradicts it is settled as transformers settles it, or refused by name.

    stored twice though tied       the same numbers: one is kept. Different ones: both are, and the model is not tied
    stored once of what is tied    that one is both
    missing, misshapen, no float   refused
    no place in the model          refused, but for what the family is known to carry along; `--leave-unused` leaves it out

transformers only warns of the last and computes without it: fewer layers than the weights have, no biases. Its rule for tied
weights is that of `PreTrainedModel.tie_weights` when called by `from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.experts.checkpoint import FLOATS, Checkpoint
from refold.errors import InputError

__all__ = ["Agreement", "agree", "by"]

KNOWN = (
    r"\.rotary_emb\.inv_freq$",  # computed, though older versions of transformers stored it
    r"\.EncDecAttention\.relative_attention_bias\.weight$",  # of T5's first release: nothing ever used it
)
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Agreement:
    """Attributes:
    stored: names, in the model's order, whose tensors go into the bundle.
    notes: what did not agree, and what was done; for the user.
    """

    stored: Sequence[str]
    notes: Sequence[str]


def agree(checkpoint: Checkpoint, model: Any, state: Mapping[str, Any], on_disk: Mapping[str, str], unused: bool) -> Agreement:
    """Settles which resident tensors are stored.

    Args:
        model: transformers' model, made from config.json alone. state: its resident tensors by name: shapes and types.
        on_disk: from a tensor's name in the model to its name in the checkpoint; experts' left out.
        unused: leave out what the model has no place for.

    Raises:
        InputError: a tensor is missing, misshapen, of a type that holds no weights, or has no place.
    """
    notes = []
    for name, disk in on_disk.items():
        if name in state:
            _check(checkpoint, disk, state[name])
    tied = dict(model.all_tied_weights_keys)
    dropped = set()
    for target, source in tied.items():
        if target not in on_disk or source not in on_disk:
            continue
        if checkpoint.same(on_disk[target], on_disk[source]):
            dropped.add(target)
        else:
            notes.append(
                f"config.json ties {on_disk[target]} to {on_disk[source]}, but both are stored and differ: "
                "they stay two, as transformers keeps them."
            )
    for name in state:
        group = {name, tied.get(name, name)} | {t for t, s in tied.items() if s == tied.get(name, name)}
        if not group & on_disk.keys():
            untied = name in _possible(model) and not model.config.tie_word_embeddings
            why = (
                "config.json does not tie it to the embedding, and it is not stored"
                if untied
                else "the checkpoint is incomplete"
            )
            raise InputError(f"{checkpoint.folder} lacks {name}: {why}.", code="checkpoint")
    notes += _without_place(checkpoint, model, [d for n, d in on_disk.items() if n not in state], unused)
    notes += _other_type(checkpoint, model, on_disk)
    return Agreement([n for n in state if n in on_disk and n not in dropped], notes)


def _check(checkpoint: Checkpoint, disk: str, tensor: Any) -> None:
    if checkpoint.shape(disk) != tuple(tensor.shape):
        raise InputError(
            f"{disk} has shape {by(checkpoint.shape(disk))} where config.json asks for {by(tensor.shape)}.", code="checkpoint"
        )
    if tensor.is_floating_point() and checkpoint.dtype(disk) not in FLOATS:
        raise InputError(
            f"{disk} is {checkpoint.dtype(disk)}: weights are bfloat16, float16 or float32. Give the original checkpoint.",
            code="checkpoint",
        )


def _possible(model: Any) -> Mapping[str, str]:
    """Names that could be tied, whatever config.json says."""
    return model._tied_weights_keys or {}


def _without_place(checkpoint: Checkpoint, model: Any, names: Sequence[str], unused: bool) -> list[str]:
    if not names:
        return []
    patterns = [*KNOWN, *(model._keys_to_ignore_on_load_unexpected or ())]
    layers, more = (int(getattr(model.config, name, 0) or 0) for name in ("num_hidden_layers", "num_nextn_predict_layers"))
    patterns += [rf"^model\.layers\.{n}\." for n in range(layers, layers + more)]  # predict further tokens; no text needs them
    strange = sorted(n for n in names if not any(re.search(p, n) for p in patterns))
    if strange and not unused:
        raise InputError(
            f"config.json gives no place to {_listed(strange)} of {checkpoint.folder}: without them the model is another one. "
            "Correct config.json, or leave them out with --leave-unused.",
            code="unused",
        )
    return [f"The model has no place for {_listed(sorted(names))}: left out."]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _other_type(checkpoint: Checkpoint, model: Any, on_disk: Mapping[str, str]) -> list[str]:
    """The embedding stands for the checkpoint: some families store routers wider."""
    embedding = model.get_input_embeddings()
    name = next((f"{n}.weight" for n, m in model.named_modules() if m is embedding), "")
    said = str(getattr(model.config, "dtype", None) or "").removeprefix("torch.")
    wanted = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(said)
    if wanted is None or name not in on_disk or checkpoint.dtype(on_disk[name]) == wanted:
        return []
    return [f"config.json says {said}, {on_disk[name]} is stored as {checkpoint.dtype(on_disk[name])}: kept as stored."]


def by(shape: Sequence[int]) -> str:
    """2 x 3 of (2, 3)."""
    return " x ".join(map(str, shape)) or "()"
