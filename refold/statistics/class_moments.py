"""How each norm site's moments depend on the class mix: per group of classes, measured at export on calibration images.

A group is a class where there are few, else classes that answer alike. Moments are kept relative to the exported statistics,
in 16 bits: an error of a thousandth of a standard deviation.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError

__all__ = ["ClassMoments"]

F64 = NDArray[np.float64]
FORMAT = 1
LEAST_SPREAD = 1e-3
ASSUMED_SPREAD = 0.5  # where it was not measured
EXTREME = 6e4  # largest number of 16 bits, nearly


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Moments of every norm's input for images of each group of classes, behind the exported statistics.

    Attributes:
        groups: float64 (classes, K), rows sum to 1: which group a class belongs to.
        mean: float64 (K, channels).
        variance: float64 (K, channels), over images and space.
        between: float64 (K, channels), variance between the means of single images.
        spread: float64 (K, channels), variance of what single images say about the logarithm of `variance`.
        counts: float64 (K,), calibration images behind each group's; zeros: they are taken as exact.
    """

    groups: F64
    mean: F64
    variance: F64
    between: F64
    spread: F64
    counts: F64

    @property
    def count(self) -> int:
        """K."""
        return int(self.mean.shape[0])

    def mix(self, probabilities: NDArray[np.floating], prior: float = 0.5) -> F64:
        """The mix of groups that answers speak of, float64 (K,): their mean, with `prior` images of each group beside them.

        Args:
            probabilities: (N, classes).
        """
        counts = probabilities.astype(np.float64) @ self.groups
        total = counts.sum(0) + prior
        mix: F64 = total / total.sum()
        return mix

    def chance(self, mix: F64, images: float) -> tuple[F64, F64]:
        """Sampling variance of an observed mean and of the logarithm of an observed variance, around those expected at a mix,
        float64 (channels,) each. The expected ones have their own: groups are known from so many calibration images.

        Args:
            images: independent images observed.
        """
        known = self.counts > 0
        share = mix / max(images, 1.0) + np.where(known, mix**2 / np.where(known, self.counts, 1.0), 0.0)
        return share @ self.between, share @ self.spread

    @property
    def flat(self) -> F64:
        """Every group alike, float64 (K,)."""
        return np.full(self.count, 1 / self.count)

    @property
    def home(self) -> F64:
        """The mix of the calibration images, float64 (K,)."""
        total = float(self.counts.sum())
        return self.counts / total if total > 0 else self.flat

    def moments(self, mix: F64) -> tuple[F64, F64]:
        """Expected mean and variance of every channel at a mix, float64 (channels,) each."""
        mean = mix @ self.mean
        variance = mix @ (self.variance + self.mean**2) - mean**2
        return mean, np.maximum(variance, 1e-12)

    def to_bytes(self, mean: F64, variance: F64) -> bytes:
        """An npz without pickles. `mean`, `variance`: the exported statistics, float64 (channels,)."""
        deviation = np.sqrt(np.maximum(variance, 1e-12))
        out = io.BytesIO()
        np.savez_compressed(
            out,
            format=np.int64(FORMAT),
            groups=self.groups.astype(np.float32),
            mean=_half((self.mean - mean) / deviation),
            variance=_half(np.log(np.maximum(self.variance, 1e-12) / deviation**2)),
            between=_half(np.log(np.maximum(self.between, 1e-12) / deviation**2)),
            spread=_half(np.log(np.maximum(self.spread, LEAST_SPREAD))),
            counts=self.counts.astype(np.float32),
        )
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, mean: F64, variance: F64, classes: int) -> ClassMoments:
        """What `to_bytes` gave, for the same exported statistics.

        Raises:
            BundleError: damaged, of a newer format, or of another model.
        """
        deviation = np.sqrt(np.maximum(variance, 1e-12))
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                if int(arrays["format"]) != FORMAT:
                    raise BundleError("The bundle's class moments are of a newer format: update Refold.", code="newer-format")
                groups = arrays["groups"].astype(np.float64)
                found = cls(
                    groups,
                    arrays["mean"].astype(np.float64) * deviation + mean,
                    np.exp(arrays["variance"].astype(np.float64)) * deviation**2,
                    *_sampling(arrays, groups.shape[1], deviation),
                )
            k, channels = found.groups.shape[1], mean.shape[0]
            held = (found.groups, found.mean, found.variance, found.between, found.spread, found.counts)
            shapes, finite = tuple(a.shape for a in held), all(np.isfinite(a).all() for a in held)
            if shapes != ((classes, k), *[(k, channels)] * 4, (k,)) or not finite:
                raise ValueError(f"shapes {shapes}")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
            raise BundleError(
                "The bundle's class moments are damaged: export the model again.", code="damaged", detail=str(e)
            ) from e
        return found


def _sampling(arrays: Mapping[str, NDArray[Any]], k: int, deviation: F64) -> tuple[F64, F64, F64]:
    """(between, spread, counts). Of the first exporters `between` for all groups alike and the number of images are known."""
    between = np.exp(arrays["between"].astype(np.float64)) * deviation**2
    if "counts" not in arrays:
        shape = (k, len(deviation))
        return np.broadcast_to(between, shape), np.full(shape, ASSUMED_SPREAD), np.full(k, float(arrays["images"]) / k)
    spread = np.exp(arrays["spread"].astype(np.float64))
    return between, spread, arrays["counts"].astype(np.float64)


def _half(values: F64) -> NDArray[np.float16]:
    return np.clip(values, -EXTREME, EXTREME).astype(np.float16)
