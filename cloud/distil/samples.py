"""What the cloud knows of one domain: its newest uploads, and the statistics its devices reported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cloud.distil.norm_mode import Moments
from refold.errors import InputError
from refold.norms import NormSite
from refold.v1 import samples_pb2 as pb

__all__ = ["DomainEvidence"]

U8 = NDArray[np.uint8]
FADE = 0.5  # what older reports keep when a new one arrives: they were measured behind older norms
REPORT_LIMIT = 100_000  # frames: more in one report is a mistake


class DomainEvidence:
    """One domain of one cohort. Order of arrival is kept; the oldest samples go first."""

    def __init__(self, sites: Sequence[NormSite], limit: int) -> None:
        self._sites = tuple(sites)
        self._limit = limit
        self._images: list[U8] = []
        self._unbiased: list[bool] = []
        self._reports: set[str] = set()
        self._weight = 0.0
        self._mean = [np.zeros(s.channels) for s in self._sites]
        self._square = [np.zeros(s.channels) for s in self._sites]
        self.arrived = 0
        self.statistics_frames = 0

    def __len__(self) -> int:
        return len(self._images)

    def add(self, images: U8, unbiased: NDArray[np.bool_]) -> None:
        """uint8 (N, H, W, 3), and which of them were chosen at random."""
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3 or len(unbiased) != len(images):
            raise InputError(f"Samples must be uint8 pictures (N, H, W, 3), each flagged or not; these are {images.shape}.")
        if self._images and len(images) and images.shape[1:] != self._images[0].shape:
            raise InputError(f"Samples of {images.shape[1:]} do not fit the domain's, which are {self._images[0].shape}.")
        self._images.extend(images)
        self._unbiased.extend(bool(u) for u in unbiased)
        self.arrived += len(images)
        del self._images[: -self._limit]
        del self._unbiased[: -self._limit]

    @property
    def images(self) -> U8:
        return np.stack(self._images)

    def population(self, limit: int) -> U8:
        """The newest unbiased samples, uint8 (n, H, W, 3), n <= limit."""
        chosen = [i for i, u in zip(self._images, self._unbiased, strict=True) if u][-limit:]
        shape = self._images[0].shape if self._images else (0, 0, 3)
        return np.stack(chosen) if chosen else np.zeros((0, *shape), np.uint8)

    def report(self, report: pb.StatisticsReport) -> bool:
        """Counts a statistics report once; False when it was counted before.

        Raises:
            InputError: it names another network's sites, or its numbers cannot be.
        """
        if report.digest and report.digest in self._reports:
            return False
        found = {s.site: s for s in report.sites}
        if not 0 < report.frames <= REPORT_LIMIT:
            raise InputError(f"A statistics report over {report.frames} frames cannot be.")
        values = []
        for site in self._sites:
            got = found.get(site.name)
            if got is None or len(got.mean) != site.channels or len(got.variance) != site.channels:
                raise InputError(f"The statistics report does not fit the bundle at {site.name}.")
            mean, variance = np.array(got.mean, np.float64), np.array(got.variance, np.float64)
            if not (np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all()):
                raise InputError(f"The statistics of {site.name} are not finite, or a variance is negative.")
            values.append((mean, variance + mean**2))
        self._reports.add(report.digest)
        old, new = self._weight * FADE, float(report.frames)
        for i, (mean, square) in enumerate(values):
            self._mean[i] = (old * self._mean[i] + new * mean) / (old + new)
            self._square[i] = (old * self._square[i] + new * square) / (old + new)
        self._weight = old + new
        self.statistics_frames += int(report.frames)
        return True

    def reported(self) -> list[Moments]:
        """Moments the devices reported, newer reports counting for more; empty when there are none."""
        if not self._weight:
            return []
        return [
            Moments(
                torch.from_numpy(mean.astype(np.float32)),
                torch.from_numpy(np.maximum(square - mean**2, 0).astype(np.float32)),
            )
            for mean, square in zip(self._mean, self._square, strict=True)
        ]
