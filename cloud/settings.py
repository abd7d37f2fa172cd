"""Every number of the service, with its unit and its reason: `cloud.toml`, overridden by `REFOLD_CLOUD_<SECTION>__<KEY>`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from refold.configuration import Gathered, Sources, build_settings, read_toml
from refold.configuration.schema import parse_text, type_at
from refold.errors import UsageError
from refold.network import HostName
from refold.network.tls import GivenFile, PublicKey

__all__ = [
    "BundleEntry",
    "CloudSettings",
    "DeviceSettings",
    "GateSettings",
    "QuotaSettings",
    "ServerSettings",
    "StorageSettings",
    "TeacherSpec",
    "TlsSettings",
    "WorkerSettings",
    "load_settings",
]

PREFIX = "REFOLD_CLOUD_"
OWN_DISTILLER = "cloud.lesson:make_lesson"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ServerSettings(_Section):
    address: HostName = Field(default="127.0.0.1", description="interface to listen on; 0.0.0.0 for all")
    port: int = Field(default=7443, ge=0, le=65535, description="mutual TLS: devices and operators; 0 lets the system choose")
    enrol_port: int = Field(default=7444, ge=0, le=65535, description="server TLS only: join token in, device certificate out")
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Prometheus text on loopback; 0 is off")
    grace_s: float = Field(default=5.0, ge=0, description="seconds that running calls get after SIGTERM")
    message_bytes: int = Field(default=64 * 1024**2, ge=1024**2, description="largest gRPC message, bytes; 32 pictures of 2 MB")
    concurrent_calls: int = Field(
        default=4096, ge=1, description="calls at once, long polls included; more are refused, not queued"
    )


class TlsSettings(_Section):
    ca: GivenFile = Field(default=Path("ca.pem"), description="certificate of the fleet's authority")
    ca_key: GivenFile = Field(default=Path("ca.key"), description="its private key: signs device certificates")
    certificate: GivenFile = Field(default=Path("server.pem"), description="the server's certificate")
    key: GivenFile = Field(default=Path("server.key"), description="its private key")
    release_key: GivenFile = Field(default=Path("release.key"), description="Ed25519 key that signs releases")
    more_release_keys: tuple[PublicKey, ...] = Field(
        default=(), description="further public keys that devices should trust, 64 hex digits each: for rotation"
    )
    device_days: float = Field(
        default=90.0, gt=0, description="days a device certificate lasts; devices renew it, a lost one dies with it"
    )


class StorageSettings(_Section):
    database: str = Field(
        default="sqlite:///refold.db", description="SQLAlchemy URL; postgresql+psycopg://... for large fleets"
    )
    objects: Path = Field(default=Path("objects"), description="directory of pictures and bundles, by content")
    samples_per_cohort: int = Field(
        default=20_000, ge=100, description="newest samples kept per bundle and cohort; CEMA replays 10,000"
    )
    retention_days: float = Field(default=30.0, gt=0, description="days a sample is kept: pictures are personal data")
    statistics_per_cohort: int = Field(
        default=10_000, ge=100, description="newest statistics reports kept per bundle and cohort"
    )
    free_bytes: int = Field(
        default=256 * 1024**2, ge=0, description="bytes that stay free on the disk; uploads are refused first"
    )


class DeviceSettings(_Section):
    heartbeat_ms: int = Field(default=30_000, ge=1000, description="between two heartbeats; a device adds its jitter")
    poll_wait_ms: int = Field(
        default=25_000,
        ge=0,
        le=110_000,
        description="a poll is held open this long at most; clouds drop idle TCP after 4 minutes",
    )
    poll_next_ms: int = Field(default=1000, ge=0, description="pause a device makes between two polls")


class QuotaSettings(_Section):
    calls_per_minute: float = Field(default=600.0, gt=0, description="per device, after a burst of the same size")
    bytes_per_hour: float = Field(
        default=256 * 1024**2, gt=0, description="uploaded per device, after a burst of the same size"
    )
    samples_per_device: int = Field(
        default=50_000, ge=1, description="stored samples per device; the newest are refused beyond"
    )
    report_frames: int = Field(
        default=4096, ge=1, description="frames one statistics report may stand for: its weight; devices send one every 32"
    )
    frames_per_second: float = Field(
        default=240.0,
        gt=0,
        allow_inf_nan=False,
        description="fastest camera: a device cannot report more tapped frames than that since it enrolled",
    )
    frames_ahead: int = Field(
        default=10_000, ge=0, description="frames it may report beyond that: it may have worked before it enrolled"
    )
    retry_ms: int = Field(default=60_000, ge=100, le=3_600_000, description="longest delay asked of a device over its quota")


class WorkerSettings(_Section):
    mode: Literal["process", "thread", "none"] = Field(
        default="process", description="process: torch stays out of the server; thread: for tests"
    )
    threads: int = Field(default=1, ge=1, description="torch and ONNX Runtime threads of each worker")
    nice: int = Field(default=10, ge=0, le=19, description="priority given up by workers so that devices are answered first")
    look_s: float = Field(default=2.0, gt=0, description="seconds between two looks for evidence when nobody woke the worker")
    interval_s: float = Field(default=10.0, ge=0, description="seconds between two trainings of the same domain")
    home: bool = Field(
        default=True, description="also train d0, the domain of the export: its exported state already had all the labels"
    )
    held_back: float = Field(
        default=0.25, gt=0, lt=1, description="share of samples, by digest, never trained on: the gate's own"
    )
    restarts: int = Field(default=5, ge=0, description="restarts of a crashing worker before it is left alone")
    restart_s: float = Field(default=2.0, ge=0, description="delay before the first restart, seconds; doubles each time")
    distiller: str = Field(
        default=OWN_DISTILLER, description="package.module:callable that makes the distiller and its teachers"
    )


class GateSettings(_Section):
    held_back: int = Field(default=32, ge=1, description="fewest held-out samples of a domain a verdict is based on")
    held_back_most: int = Field(default=512, ge=16, description="newest held-out samples used; more cost time and add little")
    agreement_points: float = Field(
        default=0.0, description="points by which agreement with the teacher must rise, whatever chance allows; 0 or less: none"
    )
    standard_errors: float = Field(
        default=1.28, ge=0, description="a gain smaller than so many standard errors is chance: 1.28 is wrong one time in ten"
    )
    harm_errors: float = Field(
        default=1.64, ge=0, description="the same for harm, at which a candidate is refused; in between it waits for more"
    )
    tolerated_points: float = Field(
        default=4.0,
        gt=0,
        description="expected loss to be ruled out before a release whose gain is within chance passes",
    )
    judgements: int = Field(
        default=4, ge=1, description="times an undecided candidate is judged, the first included, before it is refused"
    )
    more_evidence: float = Field(
        default=1.25,
        gt=1,
        description="growth of the held-out samples before an undecided candidate is judged again",
    )
    clean_points: float = Field(default=0.5, ge=0, description="points by which accuracy on the calibration images may fall")
    shifted_clean_points: float = Field(
        default=2.0, ge=0, description="the same for a release of a shifted domain, against what the device serves there now"
    )
    shifted_clean_share: float = Field(
        default=0.25, ge=0, description="or this share of what the device alone loses there against the export, if that is more"
    )
    entropy_share: float = Field(default=0.7, ge=0, le=1, description="entropy of the predicted classes against the teacher's")


class ReleaseSettings(_Section):
    valid_days: float = Field(
        default=30.0,
        gt=0,
        le=36_500,
        description="days in which a release may be installed, counted anew at each poll it answers; what is installed stays",
    )


class TeacherSpec(_Section):
    spec: str = Field(description="exported program (.pt2) or file.py:callable")
    weights: str = Field(default="", description="safetensors, npz or weights_only checkpoint")


class BundleEntry(_Section):
    path: Path = Field(description="the .refold file")
    teachers: tuple[TeacherSpec, ...] = Field(default=(), description="their votes are averaged")


class CloudSettings(_Section):
    server: ServerSettings = ServerSettings()
    tls: TlsSettings = TlsSettings()
    storage: StorageSettings = StorageSettings()
    devices: DeviceSettings = DeviceSettings()
    quota: QuotaSettings = QuotaSettings()
    workers: WorkerSettings = WorkerSettings()
    gate: GateSettings = GateSettings()
    releases: ReleaseSettings = ReleaseSettings()
    distil: dict[str, Any] = Field(default_factory=dict, description="settings of the distiller: docs/guide/cloud.md")
    bundle: tuple[BundleEntry, ...] = ()

    def anchored(self, directory: Path) -> CloudSettings:
        """The same with relative paths resolved against `directory`, where the settings file lies."""

        def under(path: Path) -> Path:
            return path if path.is_absolute() else directory / path

        names = ("ca", "ca_key", "certificate", "key", "release_key")
        tls = self.tls.model_copy(update={n: under(getattr(self.tls, n)) for n in names})
        database = self.storage.database
        if database.startswith("sqlite:///") and not database.startswith("sqlite:////") and database != "sqlite:///:memory:":
            database = f"sqlite:///{directory.absolute() / database.removeprefix('sqlite:///')}"
        storage = self.storage.model_copy(update={"objects": under(self.storage.objects), "database": database})
        bundles = tuple(b.model_copy(update={"path": under(b.path)}) for b in self.bundle)
        return self.model_copy(update={"tls": tls, "storage": storage, "bundle": bundles})


def load_settings(path: Path, environ: Mapping[str, str] | None = None, *, assignments: Sequence[str] = ()) -> CloudSettings:
    """Reads `cloud.toml`; `assignments` win over the environment, that over the file, the file over the defaults.

    Args:
        environ: os.environ unless a test gives another.
        assignments: `section.name=value`, from the flag --set.

    Raises:
        UsageError: the file is missing, is not TOML, has an unknown name or a value out of range; names who gave it.
    """
    try:
        values = read_toml(path)
    except FileNotFoundError:
        raise UsageError(f"There is no {path}: make one with `refold cloud init {path.parent}`.", code="no-config") from None
    sources = Sources(CloudSettings, PREFIX)
    sources.file(values, str(path))
    sources.environment(os.environ if environ is None else environ)
    sources.assignments(assignments)
    settings = build_settings(CloudSettings, sources.gathered)
    if settings.distil and settings.workers.distiller == OWN_DISTILLER:
        settings = settings.model_copy(update={"distil": _own_distil(sources.gathered)})
    return settings.anchored(path.parent)


def _own_distil(gathered: Gathered) -> dict[str, Any]:
    """[distil], typed: the product's own distiller says which settings it has; another one judges its table itself."""
    from cloud.distil.settings import DistilSettings

    whole = create_model("Whole", distil=(DistilSettings, DistilSettings()))
    sources = Sources(whole, PREFIX)
    names = {path: gathered.giver(path) for path in gathered.below(("distil",))}
    sources.flags({"distil": gathered.values["distil"]}, names)
    for name, value in sources.gathered.values["distil"].items():
        if isinstance(value, str):  # of the environment
            sources.gathered.values["distil"][name] = parse_text(value, type_at(DistilSettings, (name,)))
    made = getattr(build_settings(whole, sources.gathered), "distil")  # noqa: B009  (the model is made here)
    return dict(made.model_dump(include=set(sources.gathered.values["distil"])))


def commented_toml(values: Mapping[str, Any]) -> str:
    """A `cloud.toml` with every setting: those in `values` ({section: {key: value}}) set, the others as comments."""
    lines = ["# Settings of `refold cloud serve`. A line that begins with # shows the default.", ""]
    for section, field in CloudSettings.model_fields.items():
        inner = field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            continue
        lines.append(f"[{section}]")
        for key, setting in inner.model_fields.items():
            chosen = values.get(section, {})
            value = chosen.get(key, setting.get_default())
            lines.append(f"# {setting.description}")
            lines.append(f"{'' if key in chosen else '# '}{key} = {_toml(value)}")
        lines.append("")
    lines += ["# Settings of the distiller: see docs/guide/cloud.md.", "[distil]", ""]
    lines += ["# Bundles, and who teaches them; `refold cloud add-bundle` does the same without a restart."]
    lines += ["# [[bundle]]", '# path = "model.refold"', '# teachers = [{ spec = "teacher.pt2", weights = "" }]', ""]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return json.dumps(str(value))
