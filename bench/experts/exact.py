"""The same tokens with an eighth of the experts in memory as with all: a random model of each family, and the trained one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.result import Cell, Claim
from edge.experts.cache import floor
from refold.errors import RefoldError
from refold.experts.paged import PagedModel

__all__ = ["FAMILIES", "budget", "claims", "random_checkpoint", "row"]

SHARE = 0.125
COMMON: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "num_experts_per_tok": 2,
}  # fmt: skip
SMALL: dict[str, Any] = {"intermediate_size": 64, "moe_intermediate_size": 64}
DEEPSEEK: dict[str, Any] = COMMON | SMALL | {
    "n_routed_experts": 16, "n_shared_experts": 1, "first_k_dense_replace": 0, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": COMMON | {"intermediate_size": 64, "num_local_experts": 16},
    "olmoe": COMMON | {"intermediate_size": 64, "num_experts": 16},
    "qwen2_moe": COMMON | SMALL | {"num_experts": 16, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3_moe": COMMON | SMALL | {"num_experts": 16, "head_dim": 32, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1},
    "deepseek_v3": DEEPSEEK | {"q_lora_rank": 16, "n_group": 2},
    "granitemoe": COMMON | {"intermediate_size": 64, "num_local_experts": 16},
    "switch_transformers": {
        "vocab_size": 256, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_heads": 2, "num_layers": 4, "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 16, "decoder_start_token_id": 0,
        "expert_capacity": 64, "eos_token_id": None, "pad_token_id": 0, "dropout_rate": 0.0,
    },
}  # fmt: skip


def random_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """A Hugging Face checkpoint with random weights, large enough that its greedy text is not one letter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    kind = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    model = kind.from_config(CONFIG_MAPPING[family](**FAMILIES[family])).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "norm" not in name:
                p.normal_(0, 1.2 / math.sqrt(p.shape[-1]))
    model.save_pretrained(folder)
    return folder


def budget(path: Path, share: float) -> int:
    """Bytes for a share of a bundle's records, never under the floor."""
    index = PagedModel.open(path).index
    return max(floor(index), int(share * index.total))


def row(name: str, bundle: Path, tokens: int) -> dict[str, Cell]:
    """Greedy tokens at 12.5 % against all in memory, by position."""
    from edge.experts.decode.sampling import Sampling
    from edge.experts.model import Settings, load

    out: dict[str, Cell] = {"engine": f"exact: {name}", "cap %": 100 * SHARE, "bits": 8, "tokens": tokens}
    texts = []
    try:
        for share in (1.0, SHARE):
            with load(bundle, Settings(memory=budget(bundle, share))) as running:
                texts.append([p.token for p in running.generate(list(b"To be, or not"), Sampling(max_tokens=tokens))])
                told = running.pager.counters
        out |= {
            "hit": round(told.hit_rate, 4),
            "same": sum(a == b for a, b in zip(*texts, strict=True)),
            "different": len(set(texts[0])),
        }
    except RefoldError as e:
        out["note"] = e.message
    return out


def claims(rows: list[dict[str, Cell]], tokens: int) -> list[Claim]:
    """One claim: the fewest equal tokens of any model."""
    same = [r.get("same") for r in rows]
    least = min((float(s) if isinstance(s, (int, float)) else float("nan") for s in same), default=float("nan"))
    if any(s is None for s in same):
        least = float("nan")
    text = f"8 bits, 12.5 % in memory: tokens equal to all in memory, worst of {len(rows)} models"
    return [Claim("experts.exact", text, least, "≥", tokens)]
