"""A tiny random model of each family, and the same as a bundle."""

from __future__ import annotations

import re

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from refold import NormKind, NormSite, NormState, NormTable
from refold.experts import Geometry, Tensor, encode, quantise, write_paged
from refold.norms import SiteTensors

COMMON = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
DEEPSEEK = {
    "intermediate_size": 48, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip
LOCAL = {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {"intermediate_size": 48, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": COMMON | LOCAL | {"head_dim": 16},
    "olmoe": COMMON | {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": COMMON | QWEN | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen3_moe": COMMON | QWEN | {"head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "deepseek_v2": COMMON | DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": COMMON | DEEPSEEK | {"q_lora_rank": 16, "n_group": 2, "topk_group": 1},
    "granitemoe": COMMON | LOCAL,
    "switch_transformers": {
        "vocab_size": 256, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "num_layers": 4, "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 2, "num_experts": 8, "decoder_start_token_id": 0,
        "expert_capacity": 64, "initializer_factor": 1.0, "eos_token_id": None, "pad_token_id": 0, "dropout_rate": 0.0,
    },
}  # fmt: skip


def random_model(family, **more):
    """A transformers model in float32 with weights large enough that its greedy text is not one letter."""
    config = CONFIG_MAPPING[family](**(FAMILIES[family] | more))
    torch.manual_seed(7)
    kind = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif p.ndim >= 2 and "embed" not in name and "shared.weight" not in name:
                p.normal_(0, 1.2 / p.shape[-1] ** 0.5)
    return model


def split(model):
    """((layer, expert) to its two matrices, name to resident tensor), numpy, as an export would."""
    switch = model.config.model_type == "switch_transformers"
    blocks = getattr(model.config, "num_layers", 0) if switch else 0
    experts, resident = {}, {}
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            resident[name] = tensor.numpy()
            continue
        layer = int(re.search(r"(?:layers|block)\.(\d+)\.", name)[1]) - blocks * name.startswith("encoder.")
        place = 1 if ".wo." in name or "down_proj" in name else 0
        if switch:
            number = int(re.search(r"expert_(\d+)", name)[1])
            experts.setdefault((layer, number), [None, None])[place] = tensor.numpy()
        else:
            for number, matrix in enumerate(tensor):
                experts.setdefault((layer, number), [None, None])[place] = matrix.numpy()
    for twin in model.all_tied_weights_keys if switch else ():
        resident.pop(twin, None)
    return dict(sorted(experts.items())), resident


def norm_table(resident):
    """Every gain of an RMS norm as a site, named like the gain."""
    none = np.zeros(0, np.float32)
    return NormTable(
        tuple(
            NormSite(name, NormKind.RMS, NormState(gain, none), tensors=SiteTensors(multiply=name))
            for name, gain in resident.items()
            if name.endswith(("norm.weight", "layernorm.weight"))
        )
    )


def geometry(model, experts, group=32):
    config = model.config
    up, down = next(iter(experts.values()))
    return Geometry(
        family=config.model_type,
        layers=tuple(sorted({layer for layer, _ in experts})),
        experts=1 + max(e for _, e in experts),
        top_k=getattr(config, "num_experts_per_tok", 1),
        hidden=up.shape[1],
        intermediate=down.shape[1],
        gated=up.shape[0] == 2 * down.shape[1],
        activation=getattr(config, "hidden_act", None) or config.dense_act_fn,
        group=group,
    )


def _in(array, dtype):
    stored = torch.from_numpy(array).to(dtype)
    name = "BF16" if dtype == torch.bfloat16 else "F16"
    return Tensor(name, tuple(stored.shape), stored.view(torch.int16).numpy().tobytes())


def write(path, model, bits=8, *, group=32, dtype=None, **rest):
    """A paged bundle of the model, its experts in `bits` bits, its other tensors as float32 or, matrices, in `dtype`."""
    experts, resident = split(model.float())
    records = ((*key, bits, encode(*key, [quantise(m, bits, group) for m in pair])) for key, pair in experts.items())
    config = model.config.to_dict()
    rest = {"bytes_as_tokens": True, "norms": norm_table(resident)} | rest
    if model.config.tie_word_embeddings and "lm_head.weight" in resident and config["model_type"] != "switch_transformers":
        resident.pop("lm_head.weight")
    if dtype is not None:
        resident = {n: _in(t, dtype) if t.ndim == 2 else t for n, t in resident.items()}
    return write_paged(path, geometry(model, experts, group), records, config, resident, **rest)
