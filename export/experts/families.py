"""The supported architectures: where each keeps its experts, in transformers' model and in published checkpoints.

A new family that stores experts in one of these ways is one entry here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refold.errors import ModelError

__all__ = ["FAMILIES", "Family", "Layout", "Stack", "family_of"]


@dataclass(frozen=True)
class Stack:
    """One column of blocks. module: the experts' module in transformers' model. encoder: numbered below zero."""

    module: str
    encoder: bool = False


@dataclass(frozen=True)
class Layout:
    """One way to store an expert on disk.

    Attributes:
        inner, outer: tensors whose rows, one below the other, are the expert's first and its second matrix. `{module}` is the
            stack's (or, where given, `module` with the block's number), `{expert}` the expert's number.
        fused: each tensor holds all experts, (experts, rows, columns).
        module: prefix on disk where it is not the model's.
    """

    inner: tuple[str, ...]
    outer: tuple[str, ...]
    fused: bool = False
    module: str = "{module}"


@dataclass(frozen=True)
class Family:
    """Attributes:
    architecture: transformers' class. gated: the first matrix is gate over up.
    top_k: key of the configuration, or the number. activation: key of the configuration.
    layouts: tried in this order; the first of which a block has any tensor is taken.
    renames: from a resident tensor's name on disk to its name in the model: pattern and replacement.
    epsilon: key of the norms' epsilon.
    """

    model_type: str
    architecture: str
    stacks: tuple[Stack, ...]
    layouts: tuple[Layout, ...]
    gated: bool = True
    top_k: str | int = "num_experts_per_tok"
    activation: str = "hidden_act"
    renames: tuple[tuple[str, str], ...] = ()
    epsilon: str = "rms_norm_eps"

    def resident_name(self, name: str) -> str:
        """What the model calls a tensor of the checkpoint."""
        for pattern, to in self.renames:
            name = re.sub(pattern, to, name)
        return name


MLP = (Stack("model.layers.{block}.mlp.experts"),)
STACKED = Layout(("{module}.gate_up_proj",), ("{module}.down_proj",), fused=True)
PROJECTIONS = Layout(
    ("{module}.{expert}.gate_proj.weight", "{module}.{expert}.up_proj.weight"), ("{module}.{expert}.down_proj.weight",)
)
NUMBERED = Layout(
    ("{module}.{expert}.w1.weight", "{module}.{expert}.w3.weight"),
    ("{module}.{expert}.w2.weight",),
    module="model.layers.{block}.block_sparse_moe.experts",
)
LINEARS = Layout(
    ("{module}.input_linear.weight",),
    ("{module}.output_linear.weight",),
    fused=True,
    module="model.layers.{block}.block_sparse_moe",
)
DENSE = Layout(("{module}.expert_{expert}.wi.weight",), ("{module}.expert_{expert}.wo.weight",))
BLOCK = r"^(model\.layers\.\d+)\.block_sparse_moe\."

FAMILIES: Mapping[str, Family] = {
    f.model_type: f
    for f in (
        Family("mixtral", "MixtralForCausalLM", MLP, (NUMBERED, STACKED, PROJECTIONS), renames=((BLOCK, r"\1.mlp."),)),
        Family("olmoe", "OlmoeForCausalLM", MLP, (PROJECTIONS, STACKED)),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", MLP, (PROJECTIONS, STACKED)),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", MLP, (PROJECTIONS, STACKED)),
        Family("deepseek_v2", "DeepseekV2ForCausalLM", MLP, (PROJECTIONS, STACKED)),
        Family("deepseek_v3", "DeepseekV3ForCausalLM", MLP, (PROJECTIONS, STACKED)),
        Family(
            "granitemoe",
            "GraniteMoeForCausalLM",
            (Stack("model.layers.{block}.block_sparse_moe.experts"),),
            (LINEARS, STACKED),
            renames=((r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),),
        ),
        Family(
            "switch_transformers",
            "SwitchTransformersForConditionalGeneration",
            (
                Stack("encoder.block.{block}.layer.1.mlp.experts", encoder=True),
                Stack("decoder.block.{block}.layer.2.mlp.experts"),
            ),
            (DENSE,),
            gated=False,
            top_k=1,
            activation="dense_act_fn",
            epsilon="layer_norm_epsilon",
        ),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises ModelError for an architecture that is not supported, or weights that are quantised already."""
    kind = config.get("model_type")
    known = ", ".join(FAMILIES)
    if kind not in FAMILIES:
        raise ModelError(
            f"Models of type {kind!r} are not supported as paged experts. Supported: {known}.", code="unsupported-architecture"
        )
    if config.get("quantization_config"):
        raise ModelError(
            "This checkpoint is quantised already: give the original one in bfloat16, float16 or float32.", code="quantised"
        )
    return FAMILIES[str(kind)]
