"""A transformers model around a pager: shapes first, on the meta device, then the resident tensors, one by one.

Peak memory is the resident part and one tensor: the parameters of experts are dropped while they are still only shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from edge.experts.implementation import NAME, Paging, SwitchExperts, register, take_seat
from edge.experts.implementation_lookahead import Gate, look_ahead
from edge.experts.model_halves import keep_halves
from edge.experts.weights.interface import check_dense
from edge.experts.weights.tied import tie
from refold.errors import BundleError, ModelError
from refold.experts import Tensor

__all__ = ["FAMILIES", "build"]

FAMILIES = {
    "mixtral": AutoModelForCausalLM,
    "olmoe": AutoModelForCausalLM,
    "qwen2_moe": AutoModelForCausalLM,
    "qwen3_moe": AutoModelForCausalLM,
    "deepseek_v2": AutoModelForCausalLM,
    "deepseek_v3": AutoModelForCausalLM,
    "granitemoe": AutoModelForCausalLM,
    "switch_transformers": AutoModelForSeq2SeqLM,
}
WIDE = ("switch_transformers",)  # its layers look at their weights' type
BLOCK = re.compile(r"(?P<stack>.*?)(?:layers|block)\.(?P<number>\d+)\.")


def build(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], paging: Paging, path: str, *, ahead: int = 0,
    halves: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """The model, in float32, ready for generation, its experts taken from `paging`.

    Args:
        config: the checkpoint's own configuration.
        tensors: of everything that is no expert, by the names of the model's state dict.
        path: of the bundle, for messages.
        ahead: experts to hint for the next layer; 0: none.
        halves: leave 16-bit matrices in 16 bits (edge/experts/model_halves.py).

    Raises:
        ModelError: a family that is not supported, or whose experts compute something else than records can hold.
        BundleError: the configuration cannot be used, or tensors are missing, misshapen or too many.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{path} holds a {family!r} model; supported are {', '.join(FAMILIES)}.", code="unsupported-family")
    transformers_logging.set_verbosity_error()
    register()
    model = _shapes(dict(config), str(family), path)
    gates = _seat_all(model, paging, path)
    halves &= family not in WIDE
    routers = {gate.router for gate in gates.values()}
    given = set()
    for name, tensor in tensors:
        given.add(name)
        if halves and keep_halves(model, name, tensor, routers, paging.crew):
            continue
        _put(model, name, torch.from_numpy(np.array(tensor.numpy(), np.float32)), path)
    _fill_buffers(model)
    tie(model, given, paging.crew)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise BundleError(f"{path} lacks {left[0]} and {len(left) - 1} other tensors: export it again.", code="damaged")
    if ahead:
        look_ahead(paging, gates, min(ahead, paging.geometry.experts))
    return model.eval().requires_grad_(False)


def _shapes(config: dict[str, Any], family: str, path: str) -> PreTrainedModel:
    for name in ("auto_map", "quantization_config", "torch_dtype", "dtype"):
        config.pop(name, None)
    config |= {"output_router_logits": False, "experts_implementation": NAME}
    try:
        with torch.device("meta"):
            built: PreTrainedModel = FAMILIES[family].from_config(CONFIG_MAPPING[family].from_dict(config), dtype=torch.float32)
    except Exception as e:
        raise BundleError(f"The configuration in {path} gives no {family} model: {e}.", code="damaged", detail=repr(e)) from e
    return built


def _seat_all(model: PreTrainedModel, paging: Paging, path: str) -> dict[int, Gate]:
    """Binds every experts module to its layer of the index. Returns the gates of the decoder, in order."""
    gates: dict[int, Gate] = {}
    seated = set()
    blocks = getattr(model.config, "num_layers", 0)
    for name, module in list(model.named_modules()):
        place = BLOCK.match(name)
        if not name.endswith(".experts") or place is None:
            continue
        encoder = place["stack"].startswith("encoder.")
        layer = int(place["number"]) - (blocks if encoder else 0)
        sparse = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.ModuleDict):
            check_dense(dict(module.items()), paging.geometry)
            sparse.experts = SwitchExperts(paging, layer)
        else:
            take_seat(module, paging, layer)
        seated.add(layer)
        owner = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        norm = getattr(owner, "post_attention_layernorm", getattr(owner, "layer_norm", None))
        router = getattr(sparse, "gate", getattr(sparse, "router", None))
        if not encoder and norm is not None and router is not None:
            gates[layer] = Gate(layer, model.get_submodule(place.group().rstrip(".")), norm, router)
    if seated != set(paging.geometry.layers):
        raise BundleError(
            f"{path} has experts for layers {sorted(paging.geometry.layers)}, its configuration for {sorted(seated)}: "
            "export it again.",
            code="damaged",
        )
    return gates


def _put(model: PreTrainedModel, name: str, tensor: torch.Tensor, path: str) -> None:
    owner_name, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
    except AttributeError:
        owner = None
    held = None if owner is None else owner._parameters.get(last, owner._buffers.get(last))
    if owner is None or held is None:
        raise BundleError(f"{path} has a tensor {name}, for which its model has no place: export it again.", code="damaged")
    if held.shape != tensor.shape:
        raise BundleError(
            f"{name} in {path} has the shape {tuple(tensor.shape)}, the model wants {tuple(held.shape)}: export it again.",
            code="damaged",
        )
    if last in owner._parameters:
        owner._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[last] = tensor


def _fill_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint has, as the angles of rotary embeddings: computed by the model's own initialisation."""
    for module in model.modules():
        computed = [name for name in module._non_persistent_buffers_set if _meta(module._buffers.get(name))]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if computed:
            model._init_weights(module)


def _meta(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta
