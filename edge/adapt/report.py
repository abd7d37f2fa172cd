"""What a measured set of images says to the cloud: moments of every norm's input, no image counted twice."""

from __future__ import annotations

import hashlib

import numpy as np

from edge.statistics.estimate import Estimate
from refold.statistics import Layout
from refold.v1 import adaptation_pb2  # noqa: F401  (registers the package's messages)
from refold.v1 import samples_pb2 as pb

__all__ = ["statistics_report"]


def statistics_report(
    layout: Layout,
    found: Estimate,
    *,
    bundle_digest: str,
    release_version: int,
    domain: str,
    fresh: int,
    frames: tuple[int, int],
) -> pb.StatisticsReport:
    """Of the images of one set that no report has counted yet.

    Args:
        release_version: what was served meanwhile.
        fresh: how many images.
        frames: numbers of the first and the last.
    """
    report = pb.StatisticsReport(
        bundle_digest=bundle_digest,
        release_version=release_version,
        domain=domain,
        frames=fresh,
        first_frame=frames[0],
        last_frame=frames[1],
    )
    digest = hashlib.sha256()
    means, variances = found.alone[0], np.maximum(found.alone[1] - found.alone[0] ** 2, 0.0)
    for site, cut in zip(layout.sites, layout.slices, strict=True):
        mean, variance = means[cut].astype("<f4"), variances[cut].astype("<f4")
        digest.update(site.name.encode() + b"\0" + mean.tobytes() + variance.tobytes())
        report.sites.add(site=site.name, mean=mean.tolist(), variance=variance.tolist())
    report.digest = digest.hexdigest()
    return report
