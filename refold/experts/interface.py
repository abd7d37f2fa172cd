"""What transformers' experts modules say of their own arithmetic, against what a record of two plain matrices can hold.

transformers hands every implementation of experts a module whose flags choose between several arithmetics
(`use_experts_implementation` in transformers/integrations/moe.py). A record has one of them: act(gate x) * up x, then down,
with gate rows above up rows, no bias and no norm. Whatever a module asks for beyond that is refused by name, at export and
again before it runs. Nothing here imports transformers or torch; who calls has both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from refold.errors import ModelError
from refold.experts.index import Geometry

__all__ = ["check_dense", "check_fused"]

MEANING = {
    "has_bias": "biases beside its matrices",
    "is_transposed": "transposed matrices",
    "is_concatenated": "gate and up rows that alternate",
    "has_gate": "a gate, or none, against the geometry of its records",
    "has_post_expert_norm": "a norm behind every expert",
    "_is_expert_parallel": "experts spread over several processes",
}
OTHER = ("experts_class", "experts_interface")  # arguments of the decorator that are no flags


def check_fused(module: Any, geometry: Geometry, interface: Any, activation: Any, probe: Any) -> None:
    """A module that holds all experts of a layer in stacked parameters.

    Args:
        interface: transformers.integrations.moe. activation: `ACT2FN[geometry.activation]`.
        probe: a float tensor (n,) on which activations are compared.

    Raises:
        ModelError: it computes something else than its records do, or says nothing of what it computes.
    """
    told = _flags(interface) | {
        "is_concatenated": True, "is_transposed": False, "has_bias": False, "has_gate": geometry.gated,
        "has_post_expert_norm": False, "_is_expert_parallel": False,
    }  # fmt: skip
    for name, wanted in told.items():
        found = getattr(module, name, None)
        if found is None:
            raise _refused(module, geometry, f"do not say {name}: transformers' experts interface does not reach them")
        if found != wanted:
            raise _refused(module, geometry, f"have {name}={found} ({MEANING.get(name, 'unknown here')})")
    gate = getattr(module, "_apply_gate", None)
    if geometry.gated and getattr(gate, "__func__", gate) is not interface._default_apply_gate:
        raise _refused(module, geometry, "have a gate function of their own (_apply_gate)")
    _check_activation(module, getattr(module, "act_fn", None), geometry, activation, probe)
    (rows, hidden), (out, inner) = geometry.shapes
    first = "gate_up_proj" if geometry.gated else "up_proj"
    _check_tensors(
        module, geometry, {first: (geometry.experts, rows, hidden), "down_proj": (geometry.experts, out, inner)}
    )  # fmt: skip


def check_dense(modules: Mapping[str, Any], geometry: Geometry, activation: Any, probe: Any) -> None:
    """Experts that are a module each, as Switch Transformers' are. Raises as `check_fused`."""
    for module in modules.values():
        _check_activation(module, getattr(module, "act", None), geometry, activation, probe)
        _check_tensors(module, geometry, {"wi.weight": geometry.shapes[0], "wo.weight": geometry.shapes[1]})
    if geometry.gated or len(modules) != geometry.experts:
        raise ModelError(
            f"A layer of this {geometry.family} model has {len(modules)} experts without gates; its records are of "
            f"{geometry.experts}{' with gates' * geometry.gated}.",
            code="experts-interface",
        )


def _flags(interface: Any) -> dict[str, Any]:
    """Every flag of the installed transformers with its default: one that is unknown here must have that."""
    parameters = inspect.signature(interface.use_experts_implementation).parameters
    return {name: p.default for name, p in parameters.items() if name not in OTHER}


def _check_activation(module: Any, found: Any, geometry: Geometry, wanted: Any, probe: Any) -> None:
    holds = list(getattr(found, "parameters", list)())
    if found is None or holds or not bool((found(probe) == wanted(probe)).all()):
        raise _refused(module, geometry, f"have another activation than {geometry.activation!r}, which their records name")


def _check_tensors(module: Any, geometry: Geometry, wanted: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(t.shape) for name, t in (*module.named_parameters(), *module.named_buffers())}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            there, want = found.get(name, "nothing"), wanted.get(name, "nothing")
            raise _refused(module, geometry, f"hold {name} of shape {there} where their records have {want}")


def _refused(module: Any, geometry: Geometry, why: str) -> ModelError:
    return ModelError(
        f"The experts of this {geometry.family} model ({type(module).__name__}) {why}: paged experts do not compute that.",
        code="experts-interface",
    )
