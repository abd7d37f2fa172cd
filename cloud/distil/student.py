"""The cloud's student: the bundle's exported program, whose integers stay and whose norms learn.

It computes the function the device's engine computes (weights are integer codes, activations pass fake quantisation with a
straight-through gradient), so that what is learnt here is what happens there. Its trainable tensors are gamma and beta of
every norm; the statistics are set, never trained.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cloud.distil.norm_mode import Moments, observed_moments, serve_moments
from cloud.distil.population import Population
from cloud.distil.rounding import quicken
from refold.bundle import Bundle
from refold.errors import BundleError
from refold.norms import NormSite, NormState, identifier
from refold.statistics import StatisticsModel

__all__ = ["Student"]

EDGE = 0.95  # stay inside the trust region by more than rounding


class Student:
    """A bundle's student with its norms in reach.

    Attributes:
        sites: every norm site, in execution order.
        measured: those with statistics; the order of all lists of `Moments`.
    """

    def __init__(self, bundle: Bundle) -> None:
        if not bundle.manifest.student:
            raise BundleError(f"{bundle.path} carries no student: export it again with one.", code="no-student")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.load(io.BytesIO(bundle.read(bundle.manifest.student)))
                self._network = program.module()
                quicken(self._network)
        except Exception as e:  # a damaged archive makes torch raise almost anything
            raise BundleError(
                f"The student of {bundle.path} cannot be loaded by this torch: export it again.", detail=str(e)
            ) from e
        self._trust = bundle.norms.trust_ratio
        self._model = StatisticsModel.of(bundle)
        self.sites: tuple[NormSite, ...] = bundle.norms.norms
        self.measured = tuple(s for s in self.sites if s.kind.has_statistics)
        tensors = {**dict(self._network.named_parameters()), **dict(self._network.named_buffers())}
        for parameter in self._network.parameters():
            parameter.requires_grad_(False)
        self._affine: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        for site in self.sites:
            stem = f"norms.{identifier(site.name)}"
            try:
                beta = tensors[f"{stem}.beta"] if site.exported.beta.size else None
                self._affine[site.name] = (tensors[f"{stem}.gamma"], beta)
                if site.kind.has_statistics:
                    self._buffers[site.name] = (tensors[f"{stem}.mean"], tensors[f"{stem}.variance"])
            except KeyError as e:
                raise BundleError(f"The student of {bundle.path} has no tensor {e}: export it again.", code="damaged") from e
        self.load({})

    @property
    def parameters(self) -> list[Tensor]:
        """gamma and beta of every site."""
        return [t for pair in self._affine.values() for t in pair if t is not None]

    def trainable(self, on: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(on)

    def load(self, states: Mapping[str, NormState]) -> None:
        """Sets every norm; sites left out are as exported."""
        with torch.no_grad():
            for site in self.sites:
                state = states.get(site.name, site.exported)
                gamma, beta = self._affine[site.name]
                gamma.copy_(_tensor(state.gamma))
                if beta is not None:
                    beta.copy_(_tensor(state.beta))
                if site.kind.has_statistics:
                    mean, variance = self._buffers[site.name]
                    mean.copy_(_tensor(state.mean))
                    variance.copy_(_tensor(state.variance))

    def snapshot(self) -> list[Tensor]:
        """Present gamma and beta, to go back to."""
        return [t.detach().clone() for t in self.parameters]

    def exported_values(self) -> list[Tensor]:
        """gamma and beta as exported, in the order of `parameters`."""
        return [_tensor(v) for s in self.sites for v in (s.exported.gamma, s.exported.beta) if v.size]

    def restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.parameters, values, strict=True):
                tensor.copy_(value)

    def exported_moments(self) -> list[Moments]:
        return [Moments(_tensor(s.exported.mean), _tensor(s.exported.variance)) for s in self.measured]

    def population(self, x: Tensor) -> Population:
        """A sample of a domain, float32 (N, C, H, W), whose statistics are measured behind the present gamma and beta."""
        return Population(self._network, self._model, x)

    def served(self, moments: Sequence[Moments], frames: float, strength: float) -> list[Moments]:
        """What to serve for moments that devices reported: of so many images, whose class mix nobody knows."""
        layout, model = self._model.layout, replace(self._model, strength=strength * self._model.strength)
        mean = np.concatenate([_array(m.mean) for m in moments]).astype(np.float64)
        variance = np.concatenate([_array(m.variance) for m in moments]).astype(np.float64)
        states, _ = model.served({}, np.stack([mean, variance + mean**2]), frames, model.class_moments.flat)
        return [Moments(_tensor(states[s.name].mean), _tensor(states[s.name].variance)) for s in layout.sites]

    def observe(self, x: Tensor, moments: Sequence[Moments]) -> list[Moments]:
        """Moments of every norm's input for x, float32 (N, C, H, W), behind norms that serve `moments`."""
        return observed_moments(self._network, x, moments)

    def logits(self, x: Tensor, moments: Sequence[Moments] = ()) -> Tensor:
        """float32 (N, classes), with these moments in the norms (none: those last loaded)."""
        return serve_moments(self._network, x, moments)

    def clamp(self, moments: Sequence[Moments]) -> list[Moments]:
        """Moves gamma (in place) and variances to the nearest values `refold.norms.check_state` admits; returns the moments."""
        kept = {s.name: m for s, m in zip(self.measured, moments, strict=True)}
        with torch.no_grad():
            for site in self.sites:
                gamma, _ = self._affine[site.name]
                exported = _tensor(site.exported.gamma)
                if not site.kind.has_statistics:
                    gamma.copy_(_bounded(gamma, exported, self._trust * EDGE))
                    continue
                ratio = self._trust * EDGE
                epsilon = float(np.float32(site.epsilon))
                a0 = exported * torch.rsqrt(_tensor(site.exported.variance) + epsilon)
                gamma.copy_(_bounded(gamma, exported, ratio))
                live = a0.abs() > 0
                size = torch.where(live, a0.abs(), torch.ones_like(a0))
                low = (gamma / (size * ratio)) ** 2 - epsilon
                high = (gamma * ratio / size) ** 2 - epsilon
                variance = torch.minimum(torch.maximum(kept[site.name].variance, low.clamp_min(0)), high.clamp_min(0))
                dead = ~live
                if site.scale_floor.size:
                    dead |= _tensor(site.weight_scale) * a0.abs() < _tensor(site.scale_floor)
                gamma.copy_(torch.where(dead, exported, gamma))
                variance = torch.where(dead, _tensor(site.exported.variance), variance)
                kept[site.name] = Moments(kept[site.name].mean, variance)
        return [kept[s.name] for s in self.measured]

    def states(self, moments: Sequence[Moments]) -> dict[str, NormState]:
        """What a release would carry: present gamma and beta with these moments."""
        kept = {s.name: m for s, m in zip(self.measured, moments, strict=True)}
        out = {}
        for site in self.sites:
            gamma, beta = self._affine[site.name]
            affine = (_array(gamma), _array(beta) if beta is not None else np.zeros(0, np.float32))
            if site.kind.has_statistics:
                m = kept[site.name]
                out[site.name] = NormState(*affine, _array(m.mean), _array(m.variance))
            else:
                out[site.name] = NormState(*affine)
        return out


def _bounded(values: Tensor, exported: Tensor, ratio: float) -> Tensor:
    """values with the exported signs, and sizes within `ratio` of the exported ones."""
    sign = torch.where(exported < 0, -1.0, 1.0)
    size = (values * sign).clamp_min(0)
    return sign * torch.minimum(torch.maximum(size, exported.abs() / ratio), exported.abs() * ratio)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))


def _array(values: Tensor) -> np.ndarray:
    return values.detach().numpy().astype(np.float32)
