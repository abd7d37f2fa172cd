"""Samples and reports with made-up but valid content."""

from __future__ import annotations

import hashlib
import random

from refold.v1 import samples_pb2 as pb


def sample(number: int, score: float = 0.5, size: int = 300, **fields: object) -> tuple[pb.SampleHeader, bytes]:
    payload = random.Random(number).randbytes(size)
    values = {"bundle_digest": "b" * 64, "frame": number, "size": size, **fields}
    return pb.SampleHeader(digest=hashlib.sha256(payload).hexdigest(), score=score, **values), payload  # type: ignore[arg-type]


def report(number: int, version: int = 0, domain: str = "d0", channels: int = 8) -> pb.StatisticsReport:
    values = [float(number)] * channels
    site = pb.SiteStatistics(site="conv", mean=values, variance=values)
    digest = hashlib.sha256(site.SerializeToString()).hexdigest()
    return pb.StatisticsReport(
        digest=digest, bundle_digest="b" * 64, release_version=version, domain=domain, frames=9, sites=[site]
    )
