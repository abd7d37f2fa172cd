"""Between the wire's messages and the core's values. Nothing here decides; it only refuses what does not decode."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from refold.errors import NormStateError
from refold.limits import LIMITS
from refold.norms import ActivationScale, NormKind, NormSite, NormState, NormTable, SiteTensors
from refold.v1 import norms_pb2 as pb

__all__ = [
    "activation_from_pb",
    "activation_to_pb",
    "site_from_pb",
    "site_to_pb",
    "state_from_pb",
    "state_to_pb",
    "states_from_pb",
    "states_to_pb",
    "table_from_pb",
    "table_to_pb",
]

ROLES = ("weight_scale", "bias", "bias_scale", "multiply", "add")


def state_to_pb(site: str, state: NormState) -> pb.NormState:
    return pb.NormState(
        site=site,
        gamma=state.gamma.tolist(),
        beta=state.beta.tolist(),
        mean=state.mean.tolist(),
        variance=state.variance.tolist(),
    )


def _floats(values: object) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def state_from_pb(message: pb.NormState) -> NormState:
    if len(message.gamma) > LIMITS.channels:
        raise NormStateError(f"{message.site} claims {len(message.gamma)} channels; the limit is {LIMITS.channels}.")
    return NormState(_floats(message.gamma), _floats(message.beta), _floats(message.mean), _floats(message.variance))


VECTORS = ("gamma", "beta", "mean", "variance")


def states_to_pb(states: Mapping[str, NormState]) -> pb.PackedStates:
    """All states as byte planes; about an eighth smaller than plain floats, and exact."""
    message, values = pb.PackedStates(), [np.zeros(0, "<f4")]
    for name, state in sorted(states.items()):
        message.site.append(name)
        for vector in VECTORS:
            values.append(getattr(state, vector).astype("<f4"))
            message.lengths.append(len(values[-1]))
    planes = np.concatenate(values).view(np.uint8).reshape(-1, 4).T
    message.planes = zlib.compress(planes.tobytes(), 9)
    return message


def states_from_pb(message: pb.PackedStates) -> dict[str, NormState]:
    """Raises NormStateError when names, lengths and bytes do not belong together; unpacks no more than the lengths announce."""
    names, lengths = list(message.site), np.array(message.lengths, np.int64).reshape(-1)
    if len(set(names)) != len(names):
        raise NormStateError("The states list a site twice: they were damaged or forged.", code="damaged")
    if len(names) > LIMITS.norm_sites or len(lengths) != 4 * len(names) or (lengths > LIMITS.channels).any():
        raise NormStateError(
            f"The states claim {len(names)} sites with up to {lengths.max(initial=0)} channels; the limits are "
            f"{LIMITS.norm_sites} and {LIMITS.channels}.",
            code="damaged",
        )
    total = 4 * int(lengths.sum())
    unpack = zlib.decompressobj()
    try:
        raw = unpack.decompress(message.planes, total + 1)
    except zlib.error as e:
        raise NormStateError("The states cannot be unpacked: they were damaged on their way.", code="damaged") from e
    if len(raw) != total or (total and not unpack.eof):
        raise NormStateError("The states have another length than they announce: they were damaged.", code="damaged")
    values = np.frombuffer(raw, np.uint8).reshape(4, -1).T.copy().view("<f4").reshape(-1).astype(np.float32)
    parts = iter(np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else [])
    return {name: NormState(next(parts), next(parts), next(parts), next(parts)) for name in names}


def activation_to_pb(activation: ActivationScale) -> pb.ActivationScale:
    return pb.ActivationScale(
        tensor=activation.tensor,
        scale=activation.scale,
        zero_point=activation.zero_point,
        scale_tensor=activation.scale_tensor,
        zero_point_tensor=activation.zero_point_tensor,
    )


def activation_from_pb(message: pb.ActivationScale) -> ActivationScale:
    return ActivationScale(message.tensor, message.scale, message.zero_point, message.scale_tensor, message.zero_point_tensor)


def site_to_pb(site: NormSite) -> pb.NormSite:
    return pb.NormSite(
        name=site.name,
        kind=site.kind.value,  # type: ignore[arg-type]
        channels=site.channels,
        epsilon=site.epsilon,
        has_norm=site.has_norm,
        sign=site.sign.tolist(),
        weight_scale=site.weight_scale.tolist(),
        layer_bias=site.layer_bias.tolist(),
        scale_floor=site.scale_floor.tolist(),
        input_tensor=site.input_tensor,
        exported=state_to_pb(site.name, site.exported),
        tensors=pb.SiteTensors(**{role: getattr(site.tensors, role) for role in ROLES}),
        power_of_two=site.power_of_two,
    )


def site_from_pb(message: pb.NormSite) -> NormSite:
    try:
        kind = NormKind(message.kind)
    except ValueError:
        raise NormStateError(
            f"{message.name} is a kind of norm this version does not know ({message.kind}): update Refold."
        ) from None
    if any(abs(s) != 1 for s in message.sign) or not 0 <= message.epsilon < 1e6:
        raise NormStateError(f"{message.name} has a sign that is not +1 or -1, or an impossible epsilon: it is damaged.")
    site = NormSite(
        name=message.name,
        kind=kind,
        exported=state_from_pb(message.exported),
        epsilon=message.epsilon,
        has_norm=message.has_norm,
        sign=np.array(message.sign, dtype=np.int8),
        weight_scale=_floats(message.weight_scale),
        layer_bias=_floats(message.layer_bias),
        scale_floor=_floats(message.scale_floor),
        input_tensor=message.input_tensor,
        tensors=SiteTensors(**{role: getattr(message.tensors, role) for role in ROLES}),
        power_of_two=message.power_of_two,
    )
    vectors = (site.sign, site.weight_scale, site.layer_bias, site.scale_floor)
    if kind is NormKind.FOLDED and any(v.shape != (site.channels,) for v in vectors):
        raise NormStateError(f"{message.name} has vectors of unequal length: the norm table is damaged.")
    return site


def table_to_pb(table: NormTable) -> pb.NormTable:
    return pb.NormTable(
        sites=[site_to_pb(s) for s in table.sites],
        activations=[activation_to_pb(a) for a in table.activations],
        trust_ratio=table.trust_ratio,
    )


def table_from_pb(message: pb.NormTable) -> NormTable:
    if len(message.sites) > LIMITS.norm_sites:
        raise NormStateError(f"The norm table lists {len(message.sites)} sites; the limit is {LIMITS.norm_sites}.")
    if not 1 <= message.trust_ratio < 1e6:
        raise NormStateError(f"The norm table's trust ratio of {message.trust_ratio:g} is impossible.")
    table = NormTable(
        tuple(site_from_pb(s) for s in message.sites),
        tuple(activation_from_pb(a) for a in message.activations),
        message.trust_ratio,
    )
    known = {a.tensor for a in table.activations}
    if len({s.name for s in table.sites}) != len(table.sites) or len(known) != len(table.activations):
        raise NormStateError("The norm table lists a site or an activation twice.")
    for site in table.sites:
        if site.kind is NormKind.FOLDED and site.input_tensor not in known:
            raise NormStateError(f"{site.name} reads {site.input_tensor!r}, whose scale the norm table does not list.")
    return table
