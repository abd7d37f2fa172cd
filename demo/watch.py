"""Watches the running device: answers from its file, releases and traffic from the cloud's Admin service, to the last frame."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from demo.follow import Follower
from demo.processes import Process
from demo.report import Arrival, Traffic
from demo.tally import Answer, Tally
from demo.view import Scene, View
from refold.errors import RefoldError
from refold.v1 import admin_pb2 as pb

__all__ = ["Admin", "Watch"]

REFRESH = 0.12  # seconds between two looks at the predictions
ASK = 0.5  # seconds between two questions to the cloud
PATIENCE = 30.0  # seconds without a new answer before the run is given up


class Admin(Protocol):
    """What the watch asks the cloud; None when it does not answer."""

    def status(self) -> pb.StatusResponse | None: ...

    def releases(self) -> pb.ListReleasesResponse | None: ...


class Watch:
    """Follows one device process.

    Args:
        predictions: the device's file of JSON lines.
        on_frame: told the highest frame answered, each time it grows; what it returns is shown.
        status: the device's own status.json, fresher than what the cloud hears by heartbeat.
    """

    def __init__(
        self,
        tally: Tally,
        predictions: Path,
        admin: Admin,
        view: View,
        device: Process,
        others: tuple[Process, ...] = (),
        on_frame: Callable[[int], str] | None = None,
        status: Path | None = None,
    ) -> None:
        self.tally = tally
        self.traffic = Traffic()
        self.arrivals: list[Arrival] = []
        self.metrics: dict[str, float] = {}
        self._follower = Follower(predictions)
        self._admin, self._view = admin, view
        self._device, self._others = device, others
        self._on_frame = on_frame
        self._status = status
        self._installed: dict[int, int] = {}
        self._note = ""
        self._began = time.monotonic()
        self._asked = 0.0

    def run(self) -> None:
        """Returns when every frame has its answer, or the device has ended and its file is read to the end.

        Raises:
            RefoldError: a process ended by itself with an error, or no answer came for `PATIENCE` seconds.
        """
        heard = time.monotonic()
        while self.tally.lost:
            over = self._device.exit is not None
            if self.read():
                heard = time.monotonic()
            if time.monotonic() - self._asked > ASK:
                self.ask()
            self._show()
            if over:
                if self._device.exit:
                    self._device.must_run()
                return
            for process in self._others:
                process.must_run()
            if time.monotonic() - heard > PATIENCE:
                raise RefoldError(
                    f"The device has been silent for {PATIENCE:.0f} s at frame {self.tally.last}: {self._device.tail()}. "
                    f"See {self._device.log}.",
                    code="silent",
                )
            time.sleep(REFRESH)

    def read(self) -> int:
        """Takes in new answers; returns how many."""
        lines = self._follower.read()
        for line in lines:
            answer = Answer(
                int(line["frame"]),
                int(line["class"]),
                float(line["entropy"]),
                int(line["release_version"]),
                str(line["domain"]),
            )
            self.tally.add(answer)
            self._notice(answer)
        if lines and self._on_frame:
            self._note = self._on_frame(self.tally.last)
        return len(lines)

    def _notice(self, answer: Answer) -> None:
        if answer.version and all(a.version != answer.version for a in self.arrivals):
            seconds = round(time.monotonic() - self._began, 2)
            installed = min(self._installed.get(answer.version, answer.frame), answer.frame)
            self.arrivals.append(Arrival(answer.version, answer.frame, answer.domain, seconds=seconds, installed=installed))

    def ask(self) -> None:
        """Fills in what only the cloud knows: the releases' digests and sizes, samples and bytes."""
        self._asked = time.monotonic()
        status, releases = self._admin.status(), self._admin.releases()
        if releases is not None:
            rows = {r.version: r for r in releases.releases if r.version}
            self.arrivals = [self._completed(a, rows.get(a.version)) for a in self.arrivals]
        self.metrics = self._device_metrics(status)
        samples = sum(c.samples for c in status.cohorts) if status else self.traffic.samples
        up = int(self.metrics.get("link_bytes_up", self.traffic.bytes_up))
        down = int(self.metrics.get("link_bytes_down", self.traffic.bytes_down))
        self.traffic.observe(max(self.tally.last, 0), samples, up, down)

    @staticmethod
    def _completed(arrival: Arrival, row: pb.ReleaseRow | None) -> Arrival:
        return replace(arrival, domain=row.domain, digest=row.digest, bytes=row.bytes) if row else arrival

    def _device_metrics(self, status: pb.StatusResponse | None) -> dict[str, float]:
        if self._status is not None:
            try:
                found = json.loads(self._status.read_text())
                for version in range(1, int(found.get("release_version", 0)) + 1):
                    self._installed.setdefault(version, max(self.tally.last, 0))
                return {k: float(v) for k, v in found.get("metrics", found).items() if isinstance(v, (int, float))}
            except (OSError, ValueError, AttributeError):
                pass
        return dict(status.devices[0].metrics) if status and status.devices else self.metrics

    def _show(self) -> None:
        tally = self.tally
        version, domain = (int(tally.version[tally.last]), tally.domain[tally.last]) if tally.last >= 0 else (0, "")
        self._view.show(Scene(tally, self.traffic, self.arrivals, version, domain, self._note))
