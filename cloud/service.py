# ruff: noqa: N802  (a method is called what the protocol calls it)
"""The three gRPC services. Each method: who asks, one call of plain code on a thread, one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from cloud.board import Board
from cloud.enrol import Enrolment
from cloud.fleet.operators import Operators
from cloud.identity import Peer
from cloud.ingest import Ingest
from cloud.overview import list_releases, status
from cloud.releases import Releases, check_cohort
from cloud.rpc import answers
from cloud.settings import DeviceSettings
from cloud.store import DeviceRecord, OperatorRecord, Store
from cloud.store.objects import DIGEST
from cloud.training.waiting import Waiting
from refold.errors import AccessError
from refold.v1 import adaptation_pb2 as adaptation
from refold.v1 import adaptation_pb2_grpc, admin_pb2_grpc, fleet_pb2_grpc
from refold.v1 import admin_pb2 as admin
from refold.v1 import fleet_pb2 as fleet

__all__ = ["AdaptationService", "AdminService", "EnrolService", "FleetService", "Rooms"]

P = ParamSpec("P")
T = TypeVar("T")
ANSWER_MS = 250  # a held poll is answered this much before the client's wait is over


@dataclass
class Rooms:
    """What the services share: the plain modules, the waiting board, and threads for whatever blocks."""

    store: Store
    ingest: Ingest
    enrolment: Enrolment
    releases: Releases
    board: Board
    devices: DeviceSettings
    pool: ThreadPoolExecutor
    distiller: Callable[[str, str], str]
    waiting: Callable[[str, str], Sequence[Waiting]]
    operators: Operators
    warnings: Callable[[], list[str]]

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs blocking work on a thread; the loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: work(*args, **kwargs))

    async def device(self, peer: Peer) -> DeviceRecord:
        return await self.run(self.enrolment.admit, peer)

    async def operator(self, peer: Peer) -> OperatorRecord:
        return await self.run(self.operators.admit, peer)


class FleetService(fleet_pb2_grpc.FleetServicer):
    """On the main port: renewal of a certificate, and heartbeats."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    @answers("device")
    async def Enroll(self, request: fleet.EnrollRequest, peer: Peer) -> fleet.EnrollResponse:
        return await self._rooms.run(self._rooms.enrolment.renew, peer, request)

    @answers("device")
    async def Heartbeat(self, request: fleet.HeartbeatRequest, peer: Peer) -> fleet.HeartbeatResponse:
        rooms = self._rooms
        device = await rooms.device(peer)
        await rooms.run(rooms.enrolment.heartbeat, device, request)
        bundle = request.bundle_digest if DIGEST.fullmatch(request.bundle_digest) else ""
        latest = await rooms.run(rooms.releases.current, bundle, device.cohort)
        return fleet.HeartbeatResponse(next_in_ms=rooms.devices.heartbeat_ms, latest_release_version=latest)


class EnrolService(fleet_pb2_grpc.FleetServicer):
    """On the enrolment port, where nobody has a certificate yet."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    @answers(None)
    async def Enroll(self, request: fleet.EnrollRequest, peer: Peer) -> fleet.EnrollResponse:
        return await self._rooms.run(self._rooms.enrolment.enrol, request)

    @answers(None)
    async def Heartbeat(self, request: fleet.HeartbeatRequest, peer: Peer) -> fleet.HeartbeatResponse:
        raise AccessError("Heartbeats need a device certificate, on the main port.", code="no-certificate")


class AdaptationService(adaptation_pb2_grpc.AdaptationServicer):
    """Evidence up, releases down."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    @answers("device")
    async def OfferSamples(self, request: adaptation.OfferSamplesRequest, peer: Peer) -> adaptation.OfferSamplesResponse:
        device = await self._rooms.device(peer)
        offer = await self._rooms.run(self._rooms.ingest.offer, device, list(request.headers))
        return adaptation.OfferSamplesResponse(
            wanted=offer.wanted, unwanted=offer.unwanted, retry_after_ms=offer.retry_after_ms
        )

    @answers("device")
    async def UploadSamples(self, request: adaptation.UploadSamplesRequest, peer: Peer) -> adaptation.UploadSamplesResponse:
        device = await self._rooms.device(peer)
        stored, refused = await self._rooms.run(self._rooms.ingest.upload, device, list(request.samples))
        return adaptation.UploadSamplesResponse(stored=stored, refused=refused)

    @answers("device")
    async def UploadStatistics(
        self, request: adaptation.UploadStatisticsRequest, peer: Peer
    ) -> adaptation.UploadStatisticsResponse:
        device = await self._rooms.device(peer)
        await self._rooms.run(self._rooms.ingest.statistics, device, request.report)
        return adaptation.UploadStatisticsResponse()

    @answers("device")
    async def PollRelease(self, request: adaptation.PollReleaseRequest, peer: Peer) -> adaptation.PollReleaseResponse:
        rooms = self._rooms
        device = await rooms.device(peer)
        cohort = check_cohort(request.cohort, device.cohort)
        bundle = request.bundle_digest
        wait_ms = min(int(request.wait_ms), rooms.devices.poll_wait_ms) - ANSWER_MS
        deadline = time.monotonic() + wait_ms / 1000
        answer = adaptation.PollReleaseResponse(next_in_ms=rooms.devices.poll_next_ms)
        while True:
            ticket = rooms.board.ticket(bundle, cohort)
            try:
                following = await rooms.run(rooms.releases.following, bundle, cohort, request.installed_version)
                if following.version == 0:
                    answer.use_exported = True
                    return answer
                if following.version is not None:
                    wanted = await rooms.run(rooms.releases.answer, bundle, cohort, following.version)
                    if wanted is None:  # rolled back since the line above
                        continue
                    answer.release.CopyFrom(wanted.release)
                    answer.lease.CopyFrom(wanted.lease)
                    return answer
                left = deadline - time.monotonic()
                if left <= 0 or rooms.board.closed or not await rooms.board.wait((bundle, cohort), ticket, left):
                    return answer
                await rooms.run(rooms.enrolment.known, peer)  # it may have been revoked while it waited
            finally:
                rooms.board.give_back((bundle, cohort), ticket)


class AdminService(admin_pb2_grpc.AdminServicer):
    """For operators."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms

    @answers("operator")
    async def Status(self, request: admin.StatusRequest, peer: Peer) -> admin.StatusResponse:
        await self._rooms.operator(peer)
        answer = await self._rooms.run(status, self._rooms.store, self._rooms.distiller, self._rooms.waiting)
        answer.warnings.extend(await self._rooms.run(self._rooms.warnings))
        return answer

    @answers("operator")
    async def ListReleases(self, request: admin.ListReleasesRequest, peer: Peer) -> admin.ListReleasesResponse:
        rooms = self._rooms
        await rooms.operator(peer)
        valid_ms = rooms.releases.valid_ms
        return await rooms.run(list_releases, rooms.store, request.bundle_digest, request.cohort, valid_ms)

    @answers("operator")
    async def Rollback(self, request: admin.RollbackRequest, peer: Peer) -> admin.RollbackResponse:
        await self._rooms.operator(peer)
        reason = f"{request.reason or 'no reason given'} ({peer.id})"
        version = await self._rooms.run(
            self._rooms.releases.roll_back, request.bundle_digest, request.cohort, int(request.to_version), reason
        )
        return admin.RollbackResponse(current_version=version)
