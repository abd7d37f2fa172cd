"""Configurations of a few thousand weights for every supported architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 96, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FINE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", SHAPE | {"num_local_experts": 4, "tie_word_embeddings": True}),
    "olmoe": ("OlmoeConfig", SHAPE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SHAPE | FINE | {"num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", SHAPE | FINE | {"num_experts": 4, "head_dim": 16}),
    "deepseek_v2": (
        "DeepseekV2Config",
        SHAPE | FINE | LATENT | {"n_routed_experts": 4, "n_shared_experts": 1, "q_lora_rank": None},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        SHAPE | FINE | LATENT
        | {"n_routed_experts": 4, "n_shared_experts": 1, "q_lora_rank": 16, "n_group": 2, "topk_group": 2},
    ),
    "granitemoe": ("GraniteMoeConfig", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "switch_transformers": (
        "SwitchTransformersConfig",
        {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 4, "num_sparse_encoder_layers": 2,
         "num_decoder_layers": 4, "num_sparse_decoder_layers": 2, "num_heads": 2, "num_experts": 4, "expert_capacity": 12},
    ),
}  # fmt: skip


def model(name: str) -> Any:
    """Random weights, the same each time; norms and the routers' correction are not at their trivial start."""
    import transformers

    kind, settings = CONFIGS[name]
    torch.manual_seed(7)
    config = getattr(transformers, kind)(**settings)
    from export.experts.families import FAMILIES

    made = getattr(transformers, FAMILIES[name].architecture)(config).eval()
    with torch.no_grad():
        for key, p in [*made.named_parameters(), *made.named_buffers()]:
            if "norm" in key and p.dim() == 1:
                p.uniform_(0.5, 1.5)
            elif "e_score" in key:
                p.normal_(0, 0.1)
            elif "inv_freq" not in key:
                p.normal_(0, 0.2)
    return made


def save(name: str, folder: Path, **settings: Any) -> Path:
    made = model(name)
    if dtype := settings.pop("dtype", None):
        made = made.to(dtype)
    made.save_pretrained(folder, **settings)
    return folder
