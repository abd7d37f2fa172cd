"""Which of a device's numbers can be true: what it reports is an assertion, and what the cloud computes with is checked here.

    StatisticsReport.frames         weighs a report against all others: bounded for one report, and in sum by the time since the
                                    device enrolled (`frames_possible`), counted in the database
    .first_frame, .last_frame       hold at least `frames` frames, or are both left out
    .release_version                storable; nothing is computed with it
    .sites mean, variance           finite, not negative, of a size whose square is finite as well; each site once
    SampleHeader.size, width, ...   compared with the payload and the bundle (cloud/ingest.py)
    .score, .entropy                finite; an entropy is that of a distribution
    .predicted, .frame, .taken_...  kept as they are: nothing is computed with them
    Heartbeat metrics               finite ones are shown, others left out (cloud/enrol.py)
    PollRelease.wait_ms             cut to devices.poll_wait_ms

Refusals carry the code "report", "domain", "not-finite" or "implausible".
"""

from __future__ import annotations

import math

import numpy as np

from cloud.settings import QuotaSettings
from refold.errors import InputError
from refold.limits import LIMITS
from refold.v1 import samples_pb2 as pb

__all__ = ["check_domain", "check_header", "check_report", "frames_possible", "printable"]

DOMAIN_LENGTH = 32
SITE_LENGTH = 512  # characters; a module path of a deep network has about 60
LARGEST = 2**63 - 1  # what a database's integers hold
MOMENT = 1e15  # its square is finite in float32; no norm of a working network sees a thousandth of it
ENTROPY = math.log(2**32)  # nats, of as many equally likely classes as `predicted` can name
ROUNDING = 1e-3  # nats below 0 that a softmax in half precision may come out at


def printable(text: str, length: int) -> str:
    """At most `length` characters, others than printable ones as spaces: no device steers a terminal or trips a database."""
    return "".join(c if c.isprintable() else " " for c in text[:length])


def check_domain(domain: str) -> None:
    """Raises InputError."""
    if len(domain) > DOMAIN_LENGTH or not domain.isprintable():
        raise InputError(f"A domain's name has at most {DOMAIN_LENGTH} printable characters.", code="domain")


def check_header(header: pb.SampleHeader) -> None:
    """The numbers of a sample that its payload does not prove. Raises InputError."""
    if not (math.isfinite(header.score) and math.isfinite(header.entropy)):
        raise InputError("A sample's score and entropy are finite numbers.", code="not-finite")
    if not -ROUNDING <= header.entropy <= ENTROPY + ROUNDING:
        raise InputError(
            f"A prediction's entropy is between 0 and {ENTROPY:.1f} nats, not {header.entropy:g}.", code="implausible"
        )


def frames_possible(enrolled_ms: int, now_ms: int, quota: QuotaSettings) -> int:
    """Frames that a device can have seen by now: those since it enrolled, and some from when it worked alone."""
    seconds = max(0, now_ms - enrolled_ms) / 1000
    return min(quota.frames_ahead + int(seconds * quota.frames_per_second), LARGEST)


def check_report(report: pb.StatisticsReport, quota: QuotaSettings) -> None:
    """Everything about a report that can be judged without the database.

    Raises:
        InputError: malformed, not finite, or more than can be.
    """
    check_domain(report.domain)
    if not 1 <= report.frames <= quota.report_frames:
        raise InputError(
            f"A report covers 1 to {quota.report_frames:,} frames (quota.report_frames), not {report.frames:,}.", code="report"
        )
    first, last = report.first_frame, report.last_frame
    if (first or last) and last - first + 1 < report.frames:
        raise InputError(f"Frames {first} to {last} are no {report.frames} frames.", code="report")
    if report.release_version > LARGEST:
        raise InputError("There is no such release version.", code="report")
    if not 1 <= len(report.sites) <= LIMITS.norm_sites or len({s.site for s in report.sites}) < len(report.sites):
        raise InputError("A report lists each norm site once.", code="report")
    for site in report.sites:
        _check_site(site)


def _check_site(site: pb.SiteStatistics) -> None:
    name = site.site[:64]
    if len(site.site) > SITE_LENGTH or not site.site.isprintable():
        raise InputError(f"A norm site's name has at most {SITE_LENGTH} printable characters.", code="report")
    mean, variance = np.array(site.mean, np.float32), np.array(site.variance, np.float32)
    if len(mean) != len(variance) or not 1 <= len(mean) <= LIMITS.channels:
        raise InputError(f"The statistics of {name!r} have no fitting lengths.", code="report")
    if not (np.isfinite(mean).all() and np.isfinite(variance).all() and (variance >= 0).all()):
        raise InputError(f"The statistics of {name!r} are not finite, or a variance is negative.", code="not-finite")
    if max(float(np.abs(mean).max()), math.sqrt(float(variance.max()))) > MOMENT:
        raise InputError(f"The statistics of {name!r} are larger than any network's.", code="implausible")
