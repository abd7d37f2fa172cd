"""The demo's result as one JSON-able value, and the claims it must keep, each with its value and its bar."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import refold
from demo.tally import WINDOW, Recall, Tally

__all__ = ["Arrival", "Claim", "Life", "Traffic", "build", "claims", "failed"]

LEAST_RELEASES = 1  # the gate passes none that is not shown to be better than what the device makes of a domain alone
LEAST_GAIN = 10.0  # points over the frozen engine on the shifted parts
MOST_CLEAN_LOSS = 0.5  # points under it on the clean part
MOST_RECALL_FRAMES = 200  # frames of returned fog before the known state serves again


@dataclass(frozen=True)
class Arrival:
    """A release that the device served.

    Attributes:
        frame: the first one it answered.
        installed: the frame at which the device had verified and kept it; earlier, where it is for a domain not present then.
        life: index of the device's process.
        seconds: of `frame`, since the stream began.
    """

    version: int
    frame: int
    domain: str = ""
    digest: str = ""
    bytes: int = 0
    life: int = 0
    seconds: float = 0.0
    installed: int = -1


@dataclass(frozen=True)
class Life:
    """One operating-system process of the demo; `exit` is None while it ran."""

    name: str
    pid: int
    began: float
    seconds: float
    exit: int | None = None


@dataclass
class Traffic:
    """What crossed the wire, and when (one entry per observation in the lists)."""

    samples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    at: list[int] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)

    def observe(self, frame: int, samples: int, up: int, down: int) -> None:
        self.samples, self.bytes_up, self.bytes_down = samples, up, down
        if self.at and self.at[-1] == frame:
            self.uploads[-1], self.up[-1], self.down[-1] = samples, up, down
        else:
            self.at.append(frame)
            self.uploads.append(samples)
            self.up.append(up)
            self.down.append(down)


@dataclass(frozen=True)
class Claim:
    id: str
    text: str
    value: float
    bar: str
    holds: bool


def claims(tally: Tally, arrivals: Sequence[Arrival], remembered: Recall) -> list[Claim]:
    """The promises of the demo, each with its value, its bar and whether it holds."""
    shifted, frozen = tally.shifted()
    clean = next(p for p in tally.plan.phases if p.weather == "clean")
    adapted_clean, frozen_clean = tally.accuracy(clean.first, clean.last)
    lives = [a.life for a in arrivals]
    in_one_life = max((lives.count(life) for life in set(lives)), default=0)
    recalled = 0 <= remembered.frames <= MOST_RECALL_FRAMES
    return [
        Claim("frames_lost", "Frames without an answer", float(tally.lost), "0", tally.lost == 0),
        Claim(
            "releases_in_one_life",
            "Signed releases served in one process life of the device",
            float(in_one_life),
            f"≥ {LEAST_RELEASES}",
            in_one_life >= LEAST_RELEASES,
        ),
        Claim(
            "shifted_gain",
            "Accuracy in fog and noise, points above the frozen engine",
            _round(shifted - frozen),
            f"≥ {LEAST_GAIN:g}",
            shifted - frozen >= LEAST_GAIN,
        ),
        Claim(
            "clean_gain",
            "Accuracy on the clean part, points against the frozen engine",
            _round(adapted_clean - frozen_clean),
            f"≥ -{MOST_CLEAN_LOSS:g}",
            adapted_clean - frozen_clean >= -MOST_CLEAN_LOSS,
        ),
        Claim(
            "fog_recall_frames",
            "Frames until the fog's return is met with the state known from the first time",
            float(remembered.frames),
            f"0 to {MOST_RECALL_FRAMES}",
            recalled,
        ),
        Claim(
            "fog_recall_releases",
            "Releases from the cloud that this needed",
            float(remembered.releases),
            "0",
            recalled and remembered.releases == 0,
        ),
    ]


def build(
    *,
    tally: Tally,
    arrivals: Sequence[Arrival],
    remembered: Recall,
    traffic: Traffic,
    lives: Sequence[Life],
    durations: dict[str, float],
    bundle: dict[str, Any],
    images: str,
    seed: int,
    notes: Sequence[str] = (),
    outage: tuple[int, int] | None = None,
    fps: float = 0.0,
) -> dict[str, Any]:
    """Everything `report.json` says; `demo.page.render` makes the pictures from the same value.

    Args:
        outage: first and last frame at which the cloud stood still, if it did.
        fps: frames per second that were asked for.
    """
    phases = []
    for phase in tally.plan.phases:
        adapted, frozen = tally.accuracy(phase.first, phase.last)
        row = {"name": phase.name, "weather": phase.weather, "first": phase.first, "frames": phase.frames}
        phases.append(row | {"adapted": _round(adapted), "frozen": _round(frozen), "gain": _round(adapted - frozen)})
    shifted, frozen = tally.shifted()
    every = max(5, tally.plan.frames // 500)
    all_claims = claims(tally, arrivals, remembered)
    return {
        "format": 1,
        "refold": refold.__version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cpus": _cpus()},
        "images": images,
        "seed": seed,
        "fps": _round(fps),
        "bundle": bundle,
        "frames": tally.plan.frames,
        "frames_lost": tally.lost,
        "frames_answered_twice": tally.twice,
        "phases": phases,
        "shifted": {"adapted": _round(shifted), "frozen": _round(frozen), "gain": _round(shifted - frozen)},
        "releases": [asdict(a) for a in arrivals],
        "fog_return": {k: _round(v) if isinstance(v, float) else v for k, v in asdict(remembered).items()},
        "traffic": {
            "samples": traffic.samples,
            "share": _round(traffic.samples / tally.plan.frames, 4),
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
        },
        "processes": [asdict(life) for life in lives],
        "durations": {k: _round(v) for k, v in durations.items()},
        "outage": list(outage) if outage else [],
        "notes": list(notes),
        "window": WINDOW,
        "series": tally.series(every),
        "traffic_series": {"frame": traffic.at, "uploads": traffic.uploads, "up": traffic.up, "down": traffic.down},
        "claims": [asdict(c) for c in all_claims],
        "holds": all(c.holds for c in all_claims),
    }


def failed(report: dict[str, Any]) -> list[str]:
    """One sentence for each claim that does not hold."""
    return [f"{c['text']}: {c['value']:g}, must be {c['bar']}." for c in report["claims"] if not c["holds"]]


def _round(value: float, digits: int = 2) -> float:
    return round(float(value), digits)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
