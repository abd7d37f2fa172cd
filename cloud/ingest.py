"""Samples and statistics in. Everything is idempotent by digest, nothing is believed, and bad input is refused by name.

A share of the samples, chosen by digest, is held back: training never sees it, the release gate judges with it. The choice is
a function of the content, so a picture that two devices send cannot end up on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cloud.fleet.plausible import check_domain, check_header, check_report, frames_possible
from cloud.pictures import decode_picture
from cloud.quota import Buckets
from cloud.rpc import QuotaError
from cloud.settings import QuotaSettings
from cloud.store import BundleRecord, DeviceRecord, Objects, SampleRecord, StatisticsRecord, Store
from cloud.store.objects import DIGEST, digest_of
from cloud.telemetry import UPLOAD_BYTES, UPLOADS
from refold.errors import InputError
from refold.limits import LIMITS
from refold.v1 import adaptation_pb2 as api
from refold.v1 import samples_pb2 as pb

__all__ = ["Ingest", "Offer", "held_back"]


def held_back(digest: str, share: float) -> bool:
    """Whether a sample belongs to the gate; a fixed function of its content."""
    return int(digest[:8], 16) / 2**32 < share


@dataclass
class Offer:
    """The answer to an offer: digests wanted, digests the device may forget, and a delay when it is over its quota."""

    wanted: list[str] = field(default_factory=list)
    unwanted: list[str] = field(default_factory=list)
    retry_after_ms: int = 0


class Ingest:
    """Takes what devices send. `notify(bundle_digest, cohort)` is called after something new was stored."""

    def __init__(
        self,
        store: Store,
        objects: Objects,
        quota: QuotaSettings,
        held_back_share: float,
        notify: Callable[[str, str], None] = lambda bundle, cohort: None,
    ) -> None:
        self._store, self._objects, self._quota = store, objects, quota
        self._share, self._notify = held_back_share, notify
        self._bytes = Buckets(quota.bytes_per_hour, 3600.0)

    def _refusal(self, header: pb.SampleHeader, bundles: dict[str, BundleRecord | None]) -> InputError | None:
        """Why a sample of this header can never be of use, or None."""
        if not DIGEST.fullmatch(header.digest):
            return InputError("A sample's digest is 64 lower-case hex digits.", code="digest")
        if header.bundle_digest not in bundles:
            bundles[header.bundle_digest] = self._bundle(header.bundle_digest)
        bundle = bundles[header.bundle_digest]
        if bundle is None:
            return InputError(
                f"Bundle {header.bundle_digest[:12]!r} is not adapted here: `refold cloud add-bundle` makes it known.",
                code="unknown-bundle",
            )
        if header.preprocess_digest != bundle.preprocess_digest:
            return InputError("The sample was preprocessed in another way than the bundle's.", code="preprocess")
        if (header.width, header.height) != (bundle.width, bundle.height):
            return InputError(
                f"The sample is {header.width}x{header.height}, the model takes {bundle.width}x{bundle.height}.",
                code="wrong-size",
            )
        if header.size < 1 or header.size > LIMITS.sample_bytes:
            return InputError(f"A sample has 1 to {LIMITS.sample_bytes} bytes, not {header.size}.", code="sample-too-large")
        try:
            check_domain(header.domain)
            check_header(header)
        except InputError as e:
            return e
        return None

    def _bundle(self, digest: str) -> BundleRecord | None:
        return self._store.bundle(digest) if DIGEST.fullmatch(digest) else None

    def offer(self, device: DeviceRecord, headers: list[pb.SampleHeader]) -> Offer:
        """Says which of the offered samples are wanted, in the order offered and as far as the device's quota goes.

        Raises:
            InputError: more headers than fit one call.
        """
        _check_count(len(headers))
        answer, bundles = Offer(), dict[str, "BundleRecord | None"]()
        known: dict[str, set[str]] = {}
        useful = [h for h in headers if self._refusal(h, bundles) is None]
        for bundle in {h.bundle_digest for h in useful}:
            digests = [h.digest for h in useful if h.bundle_digest == bundle]
            rows = self._store.known_samples(bundle, device.cohort, digests)
            known[bundle] = {d for d in rows if self._objects.renew(d)}  # a device forgets only what is there
        room = self._bytes.room(device.id)
        places = self._quota.samples_per_device - self._store.device_samples(device.id)
        asked: set[str] = set()
        for header in headers:
            digest = header.digest
            if self._refusal(header, bundles) is not None or digest in known[header.bundle_digest] or places <= 0:
                answer.unwanted.append(digest)
            elif digest not in asked and not answer.retry_after_ms:
                if room <= 0:
                    delay = self._bytes.delay(device.id, float(header.size))
                    answer.retry_after_ms = self._delay_ms(delay)
                    continue
                room -= header.size
                places -= 1
                asked.add(digest)
                answer.wanted.append(digest)
        return answer

    def _delay_ms(self, seconds: float) -> int:
        return max(1, min(self._quota.retry_ms, int(seconds * 1000) + 1))

    def _charge(self, device: DeviceRecord, size: int) -> None:
        """Raises QuotaError when the device has used up its bytes."""
        seconds = self._bytes.take(device.id, float(size))
        if seconds:
            raise QuotaError(
                f"Device {device.id} has used up its {self._quota.bytes_per_hour:.0f} bytes per hour.", self._delay_ms(seconds)
            )

    def upload(self, device: DeviceRecord, samples: list[pb.Sample]) -> tuple[list[str], list[api.UploadRefusal]]:
        """Stores samples durably; returns (digests stored, refusals).

        A sample that was stored before counts as stored.

        Raises:
            InputError: more samples than fit one call.
            QuotaError: the device has used up its bytes; nothing of this call was stored.
            StorageError: the disk or the database fails; what is not in an answer was not acknowledged and is sent again.
        """
        _check_count(len(samples))
        self._charge(device, sum(len(s.payload) for s in samples))
        taken: list[SampleRecord] = []
        payloads: dict[str, bytes] = {}
        refused: list[api.UploadRefusal] = []
        bundles = dict[str, "BundleRecord | None"]()
        places = self._quota.samples_per_device - self._store.device_samples(device.id)
        for sample in samples:
            try:
                if len(taken) >= places:
                    raise InputError(f"Device {device.id} has its full number of samples stored.", code="quota")
                taken.append(self._take(device, sample, bundles))
                payloads[sample.header.digest] = sample.payload
            except InputError as e:
                UPLOADS.add(1, outcome=e.code)
                refused.append(api.UploadRefusal(digest=sample.header.digest[:64], code=e.code, message=e.message))
        fresh = self._store.add_samples(taken)
        self._keep(payloads)
        UPLOADS.add(len(fresh), outcome="stored")
        UPLOADS.add(len(taken) - len(fresh), outcome="duplicate")
        UPLOAD_BYTES.add(sum(r.size for r in fresh))
        for bundle in {r.bundle_digest for r in fresh}:
            self._notify(bundle, device.cohort)
        return [r.digest for r in taken], refused

    def _keep(self, payloads: Mapping[str, bytes]) -> None:
        """Now that the rows are there nobody drops their payloads any more; one that was dropped before that is stored again.

        However long this call was held up between a payload and its row, what it acknowledges is there.
        """
        for digest, payload in payloads.items():
            if not self._objects.renew(digest):
                self._objects.put(payload)

    def _take(self, device: DeviceRecord, sample: pb.Sample, bundles: dict[str, BundleRecord | None]) -> SampleRecord:
        """Checks one sample and stores its payload; its row comes after, so that a row without a payload never exists."""
        header = sample.header
        error = self._refusal(header, bundles)
        if error is not None:
            raise error
        if len(sample.payload) != header.size or digest_of(sample.payload) != header.digest:
            raise InputError("The payload is not what its header says: it was damaged on its way.", code="digest")
        decode_picture(header.codec, sample.payload, header.width, header.height)
        self._objects.put(sample.payload)
        return SampleRecord(
            digest=header.digest,
            bundle_digest=header.bundle_digest,
            cohort=device.cohort,
            device=device.id,
            domain=header.domain,
            header=header.SerializeToString(deterministic=True),
            size=header.size,
            held_back=held_back(header.digest, self._share),
            received_ms=int(time.time() * 1000),
        )

    def statistics(self, device: DeviceRecord, report: pb.StatisticsReport) -> bool:
        """Stores one report; False when it was there already.

        Raises:
            InputError: malformed, not finite, not plausible, or for a bundle that is not adapted here.
            QuotaError: the device has used up its bytes.
            StorageError: it was not stored, and is sent again.
        """
        self._charge(device, report.ByteSize())
        if not DIGEST.fullmatch(report.digest):
            raise InputError("A report's digest is 64 lower-case hex digits.", code="digest")
        if self._bundle(report.bundle_digest) is None:
            raise InputError(f"Bundle {report.bundle_digest[:12]!r} is not adapted here.", code="unknown-bundle")
        check_report(report, self._quota)
        now = int(time.time() * 1000)
        record = StatisticsRecord(
            digest=report.digest,
            bundle_digest=report.bundle_digest,
            cohort=device.cohort,
            device=device.id,
            domain=report.domain,
            release_version=report.release_version,
            frames=report.frames,
            payload=report.SerializeToString(deterministic=True),
            received_ms=now,
        )
        fresh = self._store.add_statistics(record, frames_possible(device.enrolled_ms, now, self._quota))
        if fresh:
            self._notify(report.bundle_digest, device.cohort)
        return fresh


def _check_count(count: int) -> None:
    if count > LIMITS.samples_per_call:
        raise InputError(f"One call carries at most {LIMITS.samples_per_call} samples, not {count}.", code="too-many")
