"""Frozen integers, living norms: the one function the product rests on.

An integer layer computes  y[c] = ws[c] * xs * (sum Q[c] * x + B[c])  with integers Q that never change. Writing the
BatchNorm behind it as y = a * (conv + c0 - mean) + beta, with a = gamma / sqrt(variance + eps) and weights W = sW * Q0
quantised before folding, gives

    integers  Q  = sign(a at export) * Q0      for ever
    scale     ws = sW * |a|                    at least the site's floor
    bias      B  = round((beta + (c0 - mean) * a) / (xs * ws))     int32

Scale and bias come from the same state and always travel together. Everything is computed in float64 and rounded once,
so the same state gives the same bytes on every machine (specs: quant.md §4.1 and §4.2).

Where a target multiplies by shifting, a site says so (`power_of_two`): ws is then the power of two nearest to sW * |a|, and
gamma gives way, so that the channel keeps its mean and only its deviation is off, by a third at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refold.errors import NormStateError

__all__ = [
    "ActivationScale",
    "ExplicitAffine",
    "FoldedAffine",
    "NormKind",
    "NormSite",
    "NormState",
    "NormTable",
    "SiteTensors",
    "check_state",
    "identifier",
    "nearest_power_of_two",
    "offset_room",
    "refold",
    "unfold_moments",
]

F32 = NDArray[np.float32]
BIAS_LIMIT = 2**30  # |B| stays below half the int32 range: room for the accumulator (quant.md §4.2)
FLOOR_BITS = 28  # a dead channel's floor leaves its bias two bits of room under BIAS_LIMIT
LEAST_ROOM = 0.01  # a channel of a norm that int32 does not let be offset by this much is dead
SHARE_OF_ROOM = 1 / 64  # ... or by this share of the layer's largest |gamma| or |beta|, or by its own deviation
DEAD_ROOM = 1.0  # what a layer without a live channel can be offset by: a normalised activation's own size


class NormKind(Enum):
    """Values are those of `refold.v1.NormKind`."""

    FOLDED = 1
    BATCH = 2
    LAYER = 3
    GROUP = 4
    RMS = 5

    @property
    def has_statistics(self) -> bool:
        return self in (NormKind.FOLDED, NormKind.BATCH)


def _vector(values: object, what: str) -> F32:
    array = np.ascontiguousarray(np.asarray(values, dtype=np.float32))
    if array.ndim != 1:
        raise NormStateError(f"{what} must be one number per channel, not an array of shape {array.shape}.")
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class NormState:
    """(gamma, beta, mean, variance) of one norm; each float32 of shape (channels,).

    LAYER, GROUP and RMS states have empty mean and variance; an RMS state also has an empty beta.
    """

    gamma: F32
    beta: F32
    mean: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    variance: F32 = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        for name in ("gamma", "beta", "mean", "variance"):
            object.__setattr__(self, name, _vector(getattr(self, name), name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormState) and all(
            np.array_equal(getattr(self, n), getattr(other, n)) for n in ("gamma", "beta", "mean", "variance")
        )

    __hash__ = None  # type: ignore[assignment]

    def with_statistics(self, mean: F32, variance: F32) -> NormState:
        """The same affine parameters on other statistics: what a device's overlay is made of."""
        return replace(self, mean=mean, variance=variance)


@dataclass(frozen=True)
class SiteTensors:
    """Names, inside a target's model, of the tensors that carry a site. Roles that do not apply are empty."""

    weight_scale: str = ""
    bias: str = ""
    bias_scale: str = ""
    multiply: str = ""
    add: str = ""


@dataclass(frozen=True, eq=False)
class NormSite:
    """Where a norm lives and what bounds it; fixed at export.

    Attributes:
        sign: FOLDED; int8 (channels,), +1 or -1, already in the integers.
        weight_scale: FOLDED; float32 (channels,), scale of the unfolded integers.
        layer_bias: FOLDED; float32 (channels,), the layer's own bias.
        scale_floor: FOLDED; float32 (channels,), smallest folded scale; above sW*|a| only for channels dead at export.
        input_tensor: FOLDED; name of the activation whose scale is `xs`.
        has_norm: False for an integer layer with no norm behind it: only its bias follows the input scale.
        power_of_two: FOLDED; folded scales are rounded to powers of two, for targets that shift instead of multiplying.
    """

    name: str
    kind: NormKind
    exported: NormState
    epsilon: float = 1e-5
    has_norm: bool = True
    sign: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    weight_scale: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    layer_bias: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    scale_floor: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    input_tensor: str = ""
    tensors: SiteTensors = field(default_factory=SiteTensors)
    power_of_two: bool = False

    @property
    def channels(self) -> int:
        return int(self.exported.gamma.shape[0])

    @classmethod
    def folded(
        cls,
        name: str,
        *,
        weight_scale: ArrayLike,
        layer_bias: ArrayLike,
        exported: NormState,
        input_tensor: str,
        input_scale: float,
        epsilon: float = 1e-5,
        has_norm: bool = True,
        tensors: SiteTensors | None = None,
        power_of_two: bool = False,
    ) -> NormSite:
        """Makes a FOLDED site at export time: fixes the signs and the floors from the exported state.

        A channel whose |gamma| is about 0 would need a bias beyond int32; its floor keeps that bias at 2**28, at the price of
        letting the dead convolution through at under 1/32 of the bias in the worst case. A dead channel without an offset gets
        the floor of the layer's largest, so that a release may give it one.

        A channel with a norm is dead as well when its scale is so small that int32 holds no offset to speak of (filters of
        1e-9, the gammas of 0 of a residual branch that begins as nothing): what its convolution adds is then below 2**-16 of
        the layer's output, and its floor makes room for an offset as large as the layer's largest |gamma| or |beta|.
        """
        layer_bias = _vector(layer_bias, "layer_bias")
        a, bias = _affine(exported, layer_bias, epsilon)
        unit = float(np.float32(input_scale)) * 2.0**FLOOR_BITS
        floor = np.maximum(np.abs(bias) / unit, np.finfo(np.float32).tiny)
        size = np.asarray(_vector(weight_scale, "weight_scale") * np.abs(a), np.float64)
        dead = size <= floor
        floor = np.where(dead, np.maximum(floor, np.abs(bias).max(initial=0.0) / unit), floor)
        if has_norm:
            floor = np.maximum(floor, _floor_for_offsets(exported, a, size, float(np.float32(input_scale)) * BIAS_LIMIT))
        if power_of_two:
            mantissa, exponent = np.frexp(floor)
            floor = np.ldexp(1.0, exponent - (mantissa == 0.5))  # the next power of two upwards
        return cls(
            name=name,
            kind=NormKind.FOLDED,
            exported=exported,
            epsilon=epsilon,
            has_norm=has_norm,
            sign=np.where(a < 0, -1, 1).astype(np.int8),
            weight_scale=_vector(weight_scale, "weight_scale"),
            layer_bias=layer_bias,
            scale_floor=_vector(floor, "scale_floor"),
            input_tensor=input_tensor,
            tensors=tensors or SiteTensors(f"{name}.weight_scale", f"{name}.bias", f"{name}.bias_scale"),
            power_of_two=power_of_two,
        )


@dataclass(frozen=True)
class FoldedAffine:
    """What a FOLDED site becomes: weight_scale float32, bias int32, bias_scale float32; each (channels,)."""

    weight_scale: F32
    bias: NDArray[np.int32]
    bias_scale: F32

    def named(self, tensors: SiteTensors) -> dict[str, NDArray[np.generic]]:
        return {
            tensors.weight_scale: self.weight_scale,
            tensors.bias: self.bias,
            tensors.bias_scale: self.bias_scale,
        }


@dataclass(frozen=True)
class ExplicitAffine:
    """What any other site becomes: multiply and add, float32 (channels,). `add` is empty for RMS."""

    multiply: F32
    add: F32

    def named(self, tensors: SiteTensors) -> dict[str, NDArray[np.generic]]:
        both: dict[str, NDArray[np.generic]] = {tensors.multiply: self.multiply}
        if tensors.add:
            both[tensors.add] = self.add
        return both


def _affine(state: NormState, layer_bias: F32, epsilon: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """a = gamma / sqrt(variance + eps) and b = beta + (c0 - mean) * a, both float64."""
    a = state.gamma.astype(np.float64) / np.sqrt(state.variance.astype(np.float64) + float(np.float32(epsilon)))
    b = state.beta.astype(np.float64) + (layer_bias.astype(np.float64) - state.mean.astype(np.float64)) * a
    return a, b


def _floor_for_offsets(state: NormState, a: NDArray[np.float64], size: NDArray[np.float64], unit: float) -> NDArray[np.float64]:
    """0 where a folded scale leaves room for offsets, else the scale that does; float64 (channels,).

    Args:
        a, size: gamma / sqrt(variance + eps), and the folded scales without a floor.
        unit: the largest offset at a folded scale of 1.
    """
    largest = max(float(np.abs(state.gamma).max(initial=0.0)), float(np.abs(state.beta).max(initial=0.0)))
    deviation = np.abs(a) * np.sqrt(state.variance.astype(np.float64))  # what a mean that moves by one moves the offset by
    dead = size * unit <= np.maximum(deviation, max(largest * SHARE_OF_ROOM, LEAST_ROOM))
    room = max(largest, DEAD_ROOM if dead.all() else LEAST_ROOM)
    return np.where(dead, room / unit, 0.0)


def nearest_power_of_two(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64, each positive value's nearest power of two; from the middle of two, which is 3/4 of the larger, upwards.

    Of all powers of two it has the smallest relative error: a third at most. Exact, so the same on every machine.
    """
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(1.0, exponent - (mantissa < 0.75)), np.float64)


def _served_affine(site: NormSite, state: NormState, layer_bias: F32) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """a and b as an engine has them: on a site of powers of two, a is what makes sW * |a| one; dead channels keep theirs."""
    a, b = _affine(state, layer_bias, site.epsilon)
    if not (site.power_of_two and site.kind is NormKind.FOLDED):
        return a, b
    size = site.weight_scale.astype(np.float64) * np.abs(a)
    live = size > site.scale_floor
    size = np.where(live, size, 1.0)
    served = np.where(live, a * (nearest_power_of_two(size) / size), a)
    centre = layer_bias.astype(np.float64) - state.mean.astype(np.float64)
    return served, np.where(live, state.beta.astype(np.float64) + centre * served, b)


def refold(site: NormSite, state: NormState, input_scale: float = 1.0) -> FoldedAffine | ExplicitAffine:
    """Turns a norm state into the tensors an engine runs with. Pure; the same input gives the same bytes everywhere.

    Args:
        site: from the bundle's norm table.
        state: admissible for the site (see `check_state`, which callers run first on anything that came over a wire).
        input_scale: scale of the layer's input activation (FOLDED only).

    Raises:
        NormStateError: shapes do not fit, a value is not finite, or a bias leaves the int32 range.
    """
    _check_shape(site, state)
    if site.kind is NormKind.BATCH:
        a, b = _affine(state, np.zeros(site.channels, np.float32), site.epsilon)
        return ExplicitAffine(a.astype(np.float32), b.astype(np.float32))
    if site.kind is not NormKind.FOLDED:
        return ExplicitAffine(state.gamma, state.beta)
    a, bias = _served_affine(site, state, site.layer_bias)
    xs = float(np.float32(input_scale))
    ws = np.maximum(site.weight_scale.astype(np.float64) * np.abs(a), site.scale_floor).astype(np.float32)
    codes = np.rint(bias / (xs * ws.astype(np.float64)))
    over = np.flatnonzero(~(np.abs(codes) <= BIAS_LIMIT))
    if over.size:
        raise NormStateError(
            f"Channel {over[0]} of {site.name} needs a bias of {codes[over[0]]:.3g} steps, more than int32 holds: "
            "its scale shrank too far for its offset. Train with a bound on gamma / sqrt(variance).",
            code="bias-overflow",
        )
    return FoldedAffine(ws, codes.astype(np.int32), (np.float32(xs) * ws).astype(np.float32))


def identifier(name: str) -> str:
    """A site's or a layer's name as one identifier: what the cloud's student calls it."""
    return name.replace(".", "__").replace("@", "__at__")


def offset_room(site: NormSite, state: NormState, input_scale: float) -> NDArray[np.float64]:
    """How far beta can move from a state, up or down, before `refold` refuses the bias: float64 (channels,), FOLDED only."""
    a, bias = _served_affine(site, state, site.layer_bias)
    step = float(np.float32(input_scale)) * np.maximum(site.weight_scale.astype(np.float64) * np.abs(a), site.scale_floor)
    return np.maximum(BIAS_LIMIT * step - np.abs(bias), 0.0)


def _check_shape(site: NormSite, state: NormState) -> None:
    n = site.channels
    wanted = {
        "gamma": n,
        "beta": int(site.exported.beta.shape[0]),
        "mean": n if site.kind.has_statistics else 0,
        "variance": n if site.kind.has_statistics else 0,
    }
    for name, size in wanted.items():
        values = getattr(state, name)
        if values.shape != (size,):
            raise NormStateError(
                f"{name} of {site.name} has {values.shape[0]} values where the site has {size} channels: "
                "this state belongs to another model.",
                code="shape",
            )
        if not np.isfinite(values).all():
            raise NormStateError(f"{name} of {site.name} is not finite: the state is refused.", code="not-finite")
    if site.kind.has_statistics and (state.variance < 0).any():
        raise NormStateError(f"A variance of {site.name} is negative: the state is refused.", code="negative-variance")


def check_state(site: NormSite, state: NormState, *, trust_ratio: float = 8.0) -> None:
    """Admits a state or says why not.

    A state is admissible when its shapes fit, every value is finite, no live channel changes its sign, and every live channel's
    a = gamma / sqrt(variance + eps) stays within a factor of `trust_ratio` of its exported value (quant.md §4.2). Channels that
    were dead at export (scale under the floor) may not come alive: their integers were never seen by the calibration.

    Raises:
        NormStateError: code is one of shape, not-finite, negative-variance, sign-flip, trust-region.
    """
    _check_shape(site, state)
    if not site.kind.has_statistics:
        _check_ratio(site, state.gamma, site.exported.gamma, trust_ratio)
        return
    zeros = np.zeros(site.channels, np.float32)
    a, _ = _affine(state, zeros, site.epsilon)
    a0, _ = _affine(site.exported, zeros, site.epsilon)
    if site.kind is NormKind.BATCH:
        _check_ratio(site, a, a0, trust_ratio)
        return
    scale = site.weight_scale.astype(np.float64)
    reach = np.where(scale > 0, site.scale_floor / np.where(scale > 0, scale, 1.0), np.inf)
    live = np.abs(a0) >= reach
    flipped = np.flatnonzero((live | (np.abs(a) > reach)) & (np.where(a < 0, -1, 1) != site.sign))
    if flipped.size:
        raise NormStateError(
            f"Channel {flipped[0]} of {site.name} changes the sign of gamma; the integers carry the exported sign for ever. "
            "Clamp gamma to the exported sign and release again.",
            code="sign-flip",
        )
    _check_ratio(site, np.where(live, a, 1.0), np.where(live, a0, 1.0), trust_ratio)
    woken = np.flatnonzero(~live & (np.abs(a) > trust_ratio * np.maximum(np.abs(a0), reach)))
    if woken.size:
        raise NormStateError(
            f"Channel {woken[0]} of {site.name} was switched off at export and may not be switched on by a release.",
            code="trust-region",
        )


def _check_ratio(site: NormSite, a: NDArray[np.floating], a0: NDArray[np.floating], trust_ratio: float) -> None:
    size, size0 = np.abs(a.astype(np.float64)), np.abs(a0.astype(np.float64))
    tiny = 1e-6 * max(float(size0.max(initial=0.0)), 1e-30)
    bad = np.flatnonzero((size > trust_ratio * np.maximum(size0, tiny)) | (size * trust_ratio < size0 * (size0 > tiny)))
    if bad.size:
        c = int(bad[0])
        raise NormStateError(
            f"Channel {c} of {site.name} is scaled by {size[c] / max(size0[c], 1e-30):.3g} against its export, "
            f"outside the trust region of 1/{trust_ratio:g} to {trust_ratio:g}.",
            code="trust-region",
        )


def unfold_moments(site: NormSite, state: NormState, mean: F32, mean_square: F32) -> tuple[F32, F32]:
    """Moments of a norm's input from moments of its output, as a tap model reports them.

    Args:
        state: the state the tap model ran with.
        mean, mean_square: float32 (channels,), of the norm's output before any activation function.

    Returns:
        (mean, variance) of the norm's input, float32 (channels,). Channels dead at export keep the state's own statistics:
        nothing of their input survives in their output.
    """
    zeros = np.zeros(site.channels, np.float32)
    a, b = _served_affine(site, state, zeros)
    out_mean = mean.astype(np.float64)
    out_variance = np.maximum(mean_square.astype(np.float64) - out_mean**2, 0.0)
    live = np.abs(a) > 0
    if site.kind is NormKind.FOLDED:
        live &= site.weight_scale.astype(np.float64) * np.abs(a) > site.scale_floor
    safe = np.where(live, a, 1.0)
    in_mean = np.where(live, (out_mean - b) / safe, state.mean)
    in_variance = np.where(live, out_variance / safe**2, state.variance)
    return in_mean.astype(np.float32), in_variance.astype(np.float32)


@dataclass(frozen=True)
class ActivationScale:
    """Quantisation of one activation: real = scale * (code - zero_point), code in 0..255."""

    tensor: str
    scale: float
    zero_point: int
    scale_tensor: str = ""
    zero_point_tensor: str = ""


@dataclass(frozen=True)
class NormTable:
    """All sites and activation scales of a bundle, in execution order."""

    sites: tuple[NormSite, ...]
    activations: tuple[ActivationScale, ...] = ()
    trust_ratio: float = 8.0

    @property
    def norms(self) -> tuple[NormSite, ...]:
        """The sites a release may change."""
        return tuple(s for s in self.sites if s.has_norm)

    def site(self, name: str) -> NormSite:
        for s in self.sites:
            if s.name == name:
                return s
        raise NormStateError(f"The bundle has no norm site called {name!r}: this state belongs to another model.", code="shape")

    def exported_states(self) -> dict[str, NormState]:
        return {s.name: s.exported for s in self.norms}

    def check(self, states: Mapping[str, NormState]) -> None:
        """Admits a set of states (sites left out keep their exported state). Raises NormStateError as `check_state`."""
        for name, state in states.items():
            site = self.site(name)
            if not site.has_norm:
                raise NormStateError(f"{name} has no norm: nothing to release there.", code="shape")
            check_state(site, state, trust_ratio=self.trust_ratio)

    def tensors(
        self, states: Mapping[str, NormState] | None = None, activations: Iterable[ActivationScale] = ()
    ) -> dict[str, NDArray[np.generic]]:
        """Every adaptable tensor of the engine, by its name in the target's model, for the given states.

        Args:
            states: by site name; missing sites use their exported state.
            activations: scales that differ from the exported ones; every consumer's bias follows.

        Returns:
            Name to array: weight scales, int32 biases and bias scales of every integer layer, explicit multiply/add vectors,
            float32 scalar scale and uint8 scalar zero point of every activation.
        """
        states = states or {}
        current = {a.tensor: a for a in self.activations}
        for changed in activations:
            if changed.tensor not in current:
                raise NormStateError(f"The bundle has no activation called {changed.tensor!r}.", code="shape")
            if not (np.isfinite(changed.scale) and changed.scale > 0 and 0 <= changed.zero_point <= 255):
                raise NormStateError(f"The scale of activation {changed.tensor} is not a positive number.", code="not-finite")
            current[changed.tensor] = replace(current[changed.tensor], scale=changed.scale, zero_point=changed.zero_point)
        out: dict[str, NDArray[np.generic]] = {}
        for site in self.sites:
            xs = current[site.input_tensor].scale if site.kind is NormKind.FOLDED else 1.0
            out.update(refold(site, states.get(site.name, site.exported), xs).named(site.tensors))
        for act in current.values():
            if act.scale_tensor:
                out[act.scale_tensor] = np.asarray(act.scale, np.float32)
                out[act.zero_point_tensor] = np.asarray(act.zero_point, np.uint8)
        return out
