"""Restyling: labelled calibration pictures, made to look like a domain of which only a few dozen pictures are known.

What pictures of a domain share to second order is their spectrum. Frequencies the domain has less of were lost to a filter
(blur, fog, low contrast), those it has more of came as noise, so a clean picture is filtered by the square root of the ratio of
spectra where that is below one, and gets Gaussian noise of the difference where it is above. Colours are treated along three
fixed opponent axes. No corruption is named anywhere: all is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cloud.distil.norm_mode import Moments

__all__ = ["Style", "unexplained"]

_AXES = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
OPPONENT = _AXES / _AXES.norm(dim=1, keepdim=True)


class Style:
    """The second-order difference between two sets of pictures.

    Args:
        source: float32 (N, 3, H, W) in 0..1, what restyling starts from.
        domain: float32 (M, 3, H, W) in 0..1, an unbiased sample of some dozens.
    """

    def __init__(self, source: Tensor, domain: Tensor) -> None:
        self.source_mean = source.mean((0, 2, 3), keepdim=True)
        self.domain_mean = domain.mean((0, 2, 3), keepdim=True)
        before = _spectrum(source - self.source_mean)
        after = _spectrum(domain - self.domain_mean)
        self.gain = (after / before.clamp_min(1e-9)).clamp(max=1).sqrt()
        self.noise = ((after - before).clamp_min(0) / (source.shape[2] * source.shape[3])).sqrt()

    def __call__(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """float32 (N, 3, H, W) in 0..1, restyled with fresh noise."""
        z = torch.einsum("kc,nchw->nkhw", OPPONENT, pictures - self.source_mean)
        white = torch.fft.rfft2(torch.randn(z.shape, generator=generator))
        spectrum = torch.fft.rfft2(z) * self.gain + white * self.noise
        restyled = torch.fft.irfft2(spectrum, s=pictures.shape[2:])
        return (torch.einsum("kc,nkhw->nchw", OPPONENT, restyled) + self.domain_mean).clamp(0, 1)


def unexplained(
    domain: Sequence[Moments], restyled: Sequence[Moments], source: Sequence[Moments], again: Sequence[Moments]
) -> float:
    """How much of a shift restyling leaves over, 0 (it makes the domain) to about 1 (it makes nothing of it).

    Moments of every norm's input, in execution order, behind the same norms: for pictures of the domain, restyled ones, the
    source's, and other pictures of the domain. What the two samples of the domain differ by is chance, and is
    taken off both sides. The larger of two shares counts: over all norms, and over the first quarter, which sees textures.
    """
    left, shift, chance = (
        [_divergence(d, o) for d, o in zip(domain, others, strict=True)] for others in (restyled, source, again)
    )
    early = max(len(left) // 4, 1)
    return max(_share(left[:n], shift[:n], chance[:n]) for n in (len(left), early))


def _share(left: Sequence[float], shift: Sequence[float], chance: Sequence[float]) -> float:
    return max(sum(left) - sum(chance), 0.0) / max(sum(shift) - sum(chance), 1e-9)


def _divergence(a: Moments, b: Moments) -> float:
    """Symmetric divergence of two Gaussians per channel, mean over channels (specs/cema.md 3.7)."""
    gap = (a.mean - b.mean) ** 2
    one = (a.variance + gap) / (2 * b.variance + 1e-8) + (b.variance + gap) / (2 * a.variance + 1e-8) - 1
    return float(one.mean())


def _spectrum(centred: Tensor) -> Tensor:
    """Mean power at each frequency of each opponent axis, (3, H, W // 2 + 1)."""
    z = torch.einsum("kc,nchw->nkhw", OPPONENT, centred)
    power: Tensor = (torch.fft.rfft2(z).abs() ** 2).mean(0)
    return power
