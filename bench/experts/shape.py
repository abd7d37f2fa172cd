"""Sizes: OLMoE-1B-7B, and a small one for `--quick`; where in the residual stream the routing of a token stands."""

from __future__ import annotations

from dataclasses import dataclass

from refold.experts import Geometry, record_bytes

__all__ = ["GROUP", "OLMOE", "QUICK", "Shape"]

GROUP = 32  # neighbours that share a scale: llama.cpp's, so that both engines hold the same weights in the same bytes


@dataclass(frozen=True)
class Shape:
    """A routing-controlled model. The residual stream has three parts:

        0 .. layers x experts         token v holds 1 + (k - rank) / k at (l, e) for each expert e it uses in layer l
        then hidden / 16              a random name of ±1 for each token, which the output layer reads: v is followed by v + 1
        the rest                      contents: random, and all that attention and experts write

    `tokens` is the vocabulary: token t of the trace is word t.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    tokens: int

    def __post_init__(self) -> None:
        assert self.contents < self.hidden, "the routing does not fit the residual stream"

    @property
    def routed(self) -> int:
        return self.layers * self.experts

    @property
    def contents(self) -> int:
        """The first dimension that layers may write."""
        return self.routed + self.hidden // 16

    @property
    def geometry(self) -> Geometry:
        layers = tuple(range(self.layers))
        return Geometry("olmoe", layers, self.experts, self.top_k, self.hidden, self.intermediate, True, "silu", GROUP)

    def record(self, bits: int) -> int:
        """Bytes of one expert."""
        return record_bytes(self.geometry.shapes, bits, GROUP)

    def expert_bytes(self, bits: int) -> int:
        return self.routed * self.record(bits)

    @property
    def resident_bytes(self) -> int:
        """Float16: attention, two embeddings; the router and the norms."""
        each = 4 * self.hidden**2 + self.experts * self.hidden + 4 * self.hidden
        return 2 * (self.layers * each + 2 * self.tokens * self.hidden + self.hidden)

    def config(self) -> dict[str, object]:
        """As the checkpoint's config.json says it."""
        return {
            "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": self.tokens,
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "hidden_act": "silu",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": self.experts,
            "num_experts_per_tok": self.top_k, "norm_topk_prob": False, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False,
            "clip_qkv": None, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "dtype": "float16",
        }  # fmt: skip


OLMOE = Shape("OLMoE", layers=16, experts=64, top_k=8, hidden=2048, intermediate=1024, heads=16, tokens=2048)
QUICK = Shape("quick", layers=4, experts=32, top_k=4, hidden=1024, intermediate=1024, heads=8, tokens=1024)
