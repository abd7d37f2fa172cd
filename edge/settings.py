"""Everything a device can be told, each with its unit and its reason; the only place numbers of the daemon live.

Values come from, later ones winning: the defaults here, a TOML file, REFOLD_EDGE_<SECTION>__<NAME> in the environment, flags,
`--set SECTION.NAME=VALUE`. Unknown names are refused with the nearest known one (refold/configuration/).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge.adapt import AdaptSettings
from edge.link_settings import EnrolSettings, LinkSettings, OutboxSettings, SelectSettings
from edge.select import make_selector
from refold.configuration import Sources, build_settings, read_toml
from refold.errors import UsageError
from refold.network import HostName
from refold.network.tls import GivenText

__all__ = [
    "EdgeSettings",
    "Engine",
    "Inference",
    "Metrics",
    "Predictions",
    "Source",
    "load_settings",
]

PREFIX = "REFOLD_EDGE_"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(_Section):
    """Where frames come from."""

    path: str = Field(
        default="none", description="Folder of images, .npz or .npy, video file, camera:N, or none (requests only)."
    )
    watch: bool = Field(default=False, description="Of a folder: go on with pictures that arrive later.")
    loop: bool = Field(default=False, description="Begin again at the end.")
    fps: float = Field(default=0.0, ge=0, le=10_000, description="Frames per second at most; 0: as fast as they are served.")
    waits: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="Whether a frame waits until the device's own adaptation has looked at it: no look is dropped, a replay "
        "repeats itself. auto: frames of a file, an array or a folder that is not watched, without `fps`.",
    )
    max_frames: int = Field(default=0, ge=0, description="Stop after so many frames; 0: never.")


class Predictions(_Section):
    """What is written about each frame."""

    path: str = Field(
        default="", description="File for one line of JSON per prediction, - for standard output, empty for none."
    )
    limit_mb: int = Field(
        default=256, ge=0, description="MB after which the file is set aside as <name>.1; 0: never. Cards are small."
    )
    flush_ms: int = Field(default=100, ge=1, le=60_000, description="Milliseconds a prediction may wait in memory.")


class Engine(_Section):
    """How the model runs."""

    target: str = Field(default="", description="Target within the bundle; empty: the one that suits this machine.")
    threads: int = Field(
        default=1, ge=1, le=256, description="Threads of one inference; 1 leaves the other cores to everything else."
    )
    samples_waiting: int = Field(
        default=64, ge=1, le=100_000, description="Kept frames that may wait to be encoded; more are dropped and counted."
    )
    worker_niceness: int = Field(
        default=5, ge=0, le=19, description="Added to the priority of background threads: frames come first."
    )


class Inference(_Section):
    """The Open Inference Protocol (KServe v2) over gRPC, for applications on or near the device."""

    port: int | None = Field(default=None, ge=0, le=65_535, description="Absent: off. 0: any free port, printed at start.")
    host: HostName = Field(
        default="127.0.0.1", description="Address to listen on; the default is reachable from this machine only."
    )
    certificate: GivenText = Field(default="", description="PEM file; with `key` the port speaks TLS.")
    key: GivenText = Field(default="", description="PEM file of the certificate's private key.")
    client_ca: GivenText = Field(
        default="", description="PEM file; with it, only clients with a certificate of this CA are served."
    )
    max_batch: int = Field(default=64, ge=1, le=4096, description="Pictures per request.")
    max_mb: int = Field(default=64, ge=1, le=1024, description="MB per request; gRPC refuses more before reading it.")
    threads: int = Field(default=2, ge=1, le=64, description="Requests served at once.")
    observe: bool = Field(default=True, description="Requests of uint8 pictures also go to selector and adapter, as frames do.")

    @model_validator(mode="after")
    def _whole(self) -> Inference:
        """A security setting that is only half given would be ignored, and the port plain: it is refused instead."""
        if bool(self.certificate) != bool(self.key):
            raise ValueError(
                "inference.certificate and inference.key belong together, and one of them is missing: without both the port "
                "would not speak TLS"
            )
        if self.client_ca and not self.certificate:
            raise ValueError(
                "inference.client_ca is given without inference.certificate and inference.key: a port that does not speak TLS "
                "asks nobody for a certificate; give all three, or none"
            )
        return self


class Metrics(_Section):
    """What the device tells about itself."""

    status_s: float = Field(default=2.0, gt=0, le=3600, description="Seconds between writes of <data>/status.json.")
    port: int | None = Field(
        default=None, ge=0, le=65_535, description="Prometheus text on http://host:port/metrics; absent: off."
    )
    host: HostName = Field(default="127.0.0.1", description="Address of that port.")


class EdgeSettings(_Section):
    """The whole file. `bundle` and `data` are paths."""

    bundle: str = Field(default="", description="The .refold file to run.")
    data: str = Field(
        default="refold-data", description="Directory for everything kept across restarts; one daemon per directory."
    )
    mode: Literal["threads", "inline"] = Field(
        default="threads",
        description="inline does uploads, taps and builds between frames: repeatable, for benchmarks and tests.",
    )
    source: Source = Source()
    predictions: Predictions = Predictions()
    engine: Engine = Engine()
    adapt: AdaptSettings = Field(default=AdaptSettings(), description="The device's own adaptation.")
    select: SelectSettings | None = Field(
        default=None, description="Which frames are kept for the cloud; absent: the default selector where there is a cloud."
    )
    outbox: OutboxSettings = OutboxSettings()
    cloud: LinkSettings | None = Field(default=None, description="The adaptation service; absent: purely local.")
    enrol: EnrolSettings = EnrolSettings()
    identity: str = Field(default="", description="Directory of certificate and keys; empty: <data>/identity.")
    inference: Inference = Inference()
    metrics: Metrics = Metrics()

    @property
    def identity_folder(self) -> Path:
        return Path(self.identity) if self.identity else Path(self.data) / "identity"

    @property
    def selection(self) -> SelectSettings | None:
        """None: nothing is kept. Without a cloud, keeping frames would only wear a card out, unless asked for."""
        return self.select or (SelectSettings() if self.cloud else None)

    def adapt_settings(self) -> AdaptSettings:
        """The [adapt] section."""
        return self.adapt


def load_settings(
    path: Path | None = None,
    flags: Mapping[str, Mapping[str, Any] | Any] | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    flag_names: Mapping[tuple[str, ...], str] | None = None,
    assignments: Sequence[str] = (),
) -> EdgeSettings:
    """Reads the file, the environment and the flags.

    Args:
        path: TOML; None reads none.
        flags: nested as the file; None values are left out.
        environment: os.environ unless a test gives another.
        flag_names: the flag behind each path of `flags`, for messages.
        assignments: `section.name=value`, the last word of all.

    Raises:
        UsageError: names the file, variable or flag, the setting, what is wrong with it, and the nearest known name.
    """
    sources = Sources(EdgeSettings, PREFIX)
    if path is not None:
        try:
            values = read_toml(path)
        except FileNotFoundError as e:
            raise UsageError(f"The configuration {path} cannot be read: {e.strerror}.") from e
        _resolve_paths(values, path.parent)
        sources.file(values, str(path))
    sources.environment(os.environ if environment is None else environment)
    sources.flags(flags or {}, flag_names)
    sources.assignments(assignments)
    settings = build_settings(EdgeSettings, sources.gathered)
    if settings.select is not None:
        try:
            make_selector(settings.select.name, 2, settings.select.options)
        except UsageError as e:
            giver = ", ".join(dict.fromkeys(map(sources.gathered.giver, sources.gathered.below(("select", "options")))))
            raise UsageError(f"{giver}: select.options: {e.message}" if giver else e.message) from e
    return settings


PATHS = {("bundle",), ("data",), ("predictions", "path"), ("source", "path"), ("identity",), ("enrol", "ca")}
PATHS |= {("inference", name) for name in ("certificate", "key", "client_ca")}


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Paths in a file are relative to that file."""
    for keys in PATHS:
        section = values
        for key in keys[:-1]:
            section = section.get(key, {}) if isinstance(section.get(key, {}), dict) else {}
        value = section.get(keys[-1])
        if isinstance(value, str) and value not in ("", "-", "none") and not value.startswith("camera:"):
            section[keys[-1]] = str(folder / value)
