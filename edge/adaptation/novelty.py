"""Novelty gate: marks frames that no domain explains, with hyperdimensional vectors of bounded memory.

    image, logits ─► 11 numbers, whitened, cut at ±3 ─► x ─► h = √(2/D) cos(R x + b) ─► similarity with each domain's bundle

The 9 shift features (edge/adapt/features.py), the entropy and ln Σ exp of the logits are whitened by their covariance on the
calibration images. h is a random Fourier feature (Rahimi and Recht, NIPS 2007): h(x)·h(y) is about exp(-|x - y|² / 2ℓ²). A
domain's bundle is the mean h of its frames, so that the similarity of a frame with it is a kernel estimate of how dense the
domain is there, at a cost and a memory that do not grow with the frames.

A domain explains a frame whose similarity is at least `share` of the mean similarity of the domain's own frames; `share` is
learnt, without labels, such that one calibration image in a hundred would be marked, each judged by the others. A frame that no
domain explains is novel. Cosine similarity with bundles and a threshold from a domain's own similarities are LifeHD's novelty
test (Yu et al., IPSN 2024, arXiv 2403.04759, section 5) and SMORE's for unknown domains (Wang et al., DAC 2024, arXiv
2402.13233). EAR itself could not be read here, so nothing of its numbers is claimed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.adapt.features import FEATURES, image_features

__all__ = ["NOVEL_SCORE", "NoveltyGate", "NoveltySettings"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
NUMBERS = FEATURES + 2
NOVEL_SCORE = 4.0  # above what any selector gives: informativeness is at most 1 and its class weight at most 3.4


@dataclass(frozen=True)
class NoveltySettings:
    """Attributes:
        dimensions: D; the kernel is exact to about 1 / √D.
        reach: standard deviations at which a whitened number is cut off: one number far out, such as the entropy of one unsure
            answer, is no novelty, several are. Chosen on gaussian noise and brightness of seed 100.
        width: ℓ² in units of the numbers' own variance; 11 numbers make it the median squared distance of two frames, halved.
        marked: share of the calibration images that would be marked.
        every: one frame in so many is looked at.
        steady: frames a domain must have lasted before its frames are bundled (`AdaptSettings.probe_frames`).
        least: bundled frames before a domain explains any.
        remembered: frames a bundle is worth at most; older ones fade.
        domains: bundles kept besides home's; the one that grew longest ago goes first.
        rate: marked frames offered for upload per frame served; `burst`: at once after a quiet time.
        seed: of the projection.
    """  # fmt: skip

    dimensions: int = 2048
    reach: float = 3.0
    width: float = 11.0
    marked: float = 0.01
    every: int = 3
    steady: int = 24
    least: int = 16
    remembered: float = 512.0
    domains: int = 16
    rate: float = 0.05
    burst: float = 16.0
    seed: int = 0


class DomainBundle:
    """One domain: mean hypervector, how many frames it stands for, and their mean similarity with it."""

    def __init__(self, dimensions: int) -> None:
        self.mean = np.zeros(dimensions, np.float32)
        self.frames = self.similarity = 0.0

    def add(self, vector: F32, similarity: float, limit: float) -> None:
        """`similarity` is the frame's with the bundle before it."""
        self.frames = min(self.frames + 1, limit)
        self.mean += (vector - self.mean) / np.float32(self.frames)
        self.similarity += (similarity - self.similarity) / max(self.frames - 1, 1)


class NoveltyGate:
    """One device's gate. Not thread-safe; no clock, no I/O.

    Args:
        images: the calibration images, uint8 (N, H, W, 3), N of 8 or more.
        logits: the served model's, float32 (N, C).
        home: the domain the bundle was exported for.

    Raises:
        ValueError: fewer than 8 images, or logits that are not finite.
    """

    def __init__(self, images: U8, logits: F32, home: str, settings: NoveltySettings | None = None) -> None:
        s = self.settings = settings or NoveltySettings()
        if len(images) < 8 or not np.isfinite(logits).all():
            raise ValueError("the novelty gate needs 8 calibration images with finite logits")
        rng = np.random.default_rng(s.seed)
        self._projection = (rng.normal(size=(s.dimensions, NUMBERS)) / math.sqrt(s.width)).astype(np.float32)
        self._phase = rng.uniform(0, 2 * math.pi, s.dimensions).astype(np.float32)
        numbers = np.stack([_numbers(image, row) for image, row in zip(images, logits, strict=True)])
        self._centre = numbers.mean(0)
        centred = numbers - self._centre
        covariance = centred.T @ centred / (len(numbers) - 1)
        covariance += np.diag(1e-3 + np.diag(covariance) * (0.02 + 4.0 / len(numbers)))
        self._whiten = np.linalg.inv(np.linalg.cholesky(covariance))
        vectors = np.stack([self._encoded(row) for row in numbers])
        self.share = self._learn_home(vectors, home)
        self._home = home
        self._present, self._stayed, self._credit, self._room = home, s.steady, 1.0, math.inf
        self.frames = self.looked = self.novel = self.offered = 0

    def _learn_home(self, vectors: F32, home: str) -> float:
        n = len(vectors)
        total = vectors.sum(0)
        own = np.einsum("ij,ij->i", vectors, vectors)
        similarities = (vectors @ total - own) / (n - 1)  # each with the mean of the others
        bundle = DomainBundle(self.settings.dimensions)
        bundle.mean, bundle.frames, bundle.similarity = total / n, float(n), float(similarities.mean())
        self._bundles = {home: bundle}
        return float(np.quantile(similarities, self.settings.marked, method="lower")) / bundle.similarity

    @property
    def memory_bytes(self) -> int:
        """Of projection and bundles, at most; they do not grow with the stream."""
        s = self.settings
        return 4 * s.dimensions * (NUMBERS + 1 + s.domains + 1) + 8 * NUMBERS * (NUMBERS + 1)

    def allow(self, samples: float) -> None:
        """How many more marked frames the hour's bytes can carry; any thread."""
        self._room = samples

    def look(self, image: U8, logits: F32, domain: str) -> tuple[bool, bool]:
        """Takes the next frame: (novel, to be offered for upload). Frames between two looks are neither.

        Args:
            image: uint8 (H, W, 3).
            logits: float32 (C,), the engine's own.
            domain: name of the present domain, as the shift detector has it.
        """
        s = self.settings
        self.frames += 1
        self._credit = min(self._credit + s.rate, s.burst)
        if domain != self._present:
            self._present, self._stayed = domain, 0
        self._stayed += 1
        if self.frames % s.every:
            return False, False
        if not np.isfinite(logits).all():
            return False, False
        self.looked += 1
        novel = self._judge(self._encoded(_numbers(image, logits)))
        self.novel += novel
        offered = novel and self._credit >= 1.0 and self._room >= 1.0
        if offered:
            self._credit -= 1.0
            self._room -= 1.0
            self.offered += 1
        return novel, offered

    def _judge(self, vector: F32) -> bool:
        """Whether no domain explains the frame; the present domain learns it."""
        s = self.settings
        found = {name: float(bundle.mean @ vector) for name, bundle in self._bundles.items()}
        explained = {
            name
            for name, similarity in found.items()
            if self._bundles[name].frames >= s.least and similarity >= self.share * self._bundles[name].similarity
        }
        present = self._bundles.get(self._present)
        if self._stayed > s.steady and self._present != self._home:
            if present is None or present.frames < s.least or self._present in explained:
                self._present_bundle().add(vector, found.get(self._present, 0.0), s.remembered)
        elif self._present == self._home and self._home in explained:
            self._bundles[self._home].add(vector, found[self._home], s.remembered)
        return not explained

    def _present_bundle(self) -> DomainBundle:
        """The present domain's, now the one that grew last."""
        bundle = self._bundles.pop(self._present, None) or DomainBundle(self.settings.dimensions)
        self._bundles[self._present] = bundle
        while len(self._bundles) > self.settings.domains + 1:
            del self._bundles[next(name for name in self._bundles if name != self._home)]
        return bundle

    def _encoded(self, numbers: F64) -> F32:
        reach = self.settings.reach
        x = np.clip(self._whiten @ (numbers - self._centre), -reach, reach).astype(np.float32)
        out: F32 = np.cos(self._projection @ x + self._phase) * np.float32(math.sqrt(2.0 / self.settings.dimensions))
        return out

    def metrics(self) -> dict[str, float]:
        """Counters; any thread."""
        return {"novel_frames": float(self.novel), "novel_offered": float(self.offered), "novelty_looks": float(self.looked)}


def _numbers(image: U8, logits: F32) -> F64:
    """The NUMBERS numbers of one frame, float64: shift features, entropy as a share of ln C, ln Σ exp of the logits."""
    values = logits.astype(np.float64)
    top = values.max()
    powers = np.exp(values - top)
    total = powers.sum()
    entropy = math.log(total) - float(powers @ (values - top)) / total
    return np.append(image_features(image), (entropy / math.log(max(len(values), 2)), float(top) + math.log(total)))
