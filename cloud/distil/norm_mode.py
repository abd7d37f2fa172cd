"""Batch norms under our control, in any network: an eager module or an exported program, without touching either.

While a `NormMode` is active every batch norm of the calling thread is computed by a function of ours, which is told the norm's
number in execution order. That is all that is needed to read a population's statistics layer by layer, each measured behind
the adapted layers before it, and to normalise with a mixture of those and the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from refold.errors import ModelError

__all__ = ["Moments", "NormCall", "NormMode", "mix", "observed_moments", "population_moments", "serve_moments"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a norm's input, float32 (channels,) each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class NormCall:
    """One batch norm as it is called: its number in execution order, input (N, C, ...), source moments, affine, epsilon."""

    number: int
    x: Tensor
    source: Moments
    gamma: Tensor | None
    beta: Tensor | None
    epsilon: float

    def normalise(self, moments: Moments) -> Tensor:
        shape = (1, -1, *([1] * (self.x.dim() - 2)))
        scale = torch.rsqrt(moments.variance + self.epsilon)
        if self.gamma is not None:
            scale = scale * self.gamma
        offset = -moments.mean * scale
        if self.beta is not None:
            offset = offset + self.beta
        return self.x * scale.view(shape) + offset.view(shape)

    def observed(self) -> Moments:
        """Moments of the whole batch, population form."""
        dims = [d for d in range(self.x.dim()) if d != 1]
        mean = self.x.mean(dims)
        return Moments(mean, self.x.var(dims, unbiased=False))


class NormMode(TorchFunctionMode):
    """Sends every batch norm through `rule`; counts them. One forward pass per instance."""

    def __init__(self, rule: Callable[[NormCall], Tensor]) -> None:
        super().__init__()
        self._rule = rule
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.batch_norm:
            call = self._eager(*args, **kwargs)
        elif func is torch.ops.aten.batch_norm.default:
            call = self._exported(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        self.calls += 1
        return self._rule(call)

    def _eager(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> NormCall:
        return self._call(x, weight, bias, running_mean, running_var, eps)

    def _exported(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> NormCall:
        return self._call(x, weight, bias, running_mean, running_var, eps)

    def _call(
        self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float
    ) -> NormCall:
        if mean is None or variance is None:
            raise ModelError("A batch norm without running statistics cannot be adapted: track_running_stats must be on.")
        return NormCall(self.calls, x, Moments(mean, variance), gamma, beta, eps)


def mix(source: Moments, observed: Moments, weight: float) -> Moments:
    """Moments of a population of which a share `weight` is as observed (see `edge.adapt.overlay`)."""
    shift = source.mean - observed.mean
    mean = source.mean - weight * shift
    variance = (1 - weight) * source.variance + weight * observed.variance + weight * (1 - weight) * shift**2
    return Moments(mean, variance)


def population_moments(
    network: Callable[[Tensor], Tensor], x: Tensor, weight: float, *, source: Sequence[Moments] | None = None
) -> list[Moments]:
    """Mixed moments of every norm, in one pass over one batch: each measured behind the mixed ones before it.

    Args:
        network: anything callable that runs batch norms.
        x: a sample of the population, float32 (N, C, H, W); all of it is one batch.
        weight: share of what is observed.
        source: moments to mix with, in execution order; the network's own running statistics when left out.
    """
    found: list[Moments] = []

    def rule(call: NormCall) -> Tensor:
        anchor = source[call.number] if source is not None else call.source
        found.append(mix(anchor, call.observed(), weight))
        return call.normalise(found[-1])

    with torch.no_grad(), NormMode(rule):
        network(x)
    return found


def observed_moments(network: Callable[[Tensor], Tensor], x: Tensor, moments: Sequence[Moments]) -> list[Moments]:
    """Moments of every norm's input over one batch, behind norms that serve `moments`."""
    found: list[Moments] = []

    def rule(call: NormCall) -> Tensor:
        found.append(call.observed())
        return call.normalise(moments[call.number])

    with torch.no_grad(), NormMode(rule):
        network(x)
    return found


def serve_moments(network: Callable[[Tensor], Tensor], x: Tensor, moments: Sequence[Moments]) -> Tensor:
    """The network's output with these moments in its norms; gradients flow to its affine parameters where wanted."""
    if not moments:
        return network(x)
    with NormMode(lambda call: call.normalise(moments[call.number])):
        return network(x)
