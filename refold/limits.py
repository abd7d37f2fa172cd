"""Sizes nobody may exceed, each with its reason. Checked before memory is spent, not after."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIMITS", "Limits"]


@dataclass(frozen=True)
class Limits:
    bundle_bytes: int = 2 * 1024**3  # one model in four precisions with its student; a zip without zip64 ends at 4 GiB
    paged_bytes: int = 1 << 40  # a paged language model: DeepSeek-V3's 671 billion weights at 8 bits are 0.7 TB
    manifest_bytes: int = 64 * 1024**2  # ResNet-50's norm table is 0.6 MB; a hundredfold is still read at once
    bundle_parts: int = 256  # targets x files, with room
    release_bytes: int = 4 * 1024**2  # gRPC's default message limit; ResNet-101's norms are 0.8 MB
    signatures: int = 8  # a threshold of keys plus rotation
    norm_sites: int = 4096
    channels: int = 65536  # widest layer of any supported network is 4,096
    sample_bytes: int = 2 * 1024**2  # a 640x640 lossless WebP is about 0.5 MB
    samples_per_call: int = 256
    image_pixels: int = 64 * 1024**2  # a 64-megapixel camera; more is a decompression bomb


LIMITS = Limits()
