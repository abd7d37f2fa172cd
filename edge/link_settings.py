"""Numbers of the way between device and cloud, each with its unit and its reason. Nested into the daemon's settings.

[cloud]    LinkSettings        [outbox]   OutboxSettings        [select]   SelectSettings        [enrol]   EnrolSettings
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from refold.network import CloudAddress, EnrolAddress, ServerName
from refold.network.tls import Fingerprint, GivenFile

__all__ = ["EnrolSettings", "LinkSettings", "OutboxSettings", "SelectSettings"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LinkSettings(_Section):
    address: CloudAddress = Field(default="127.0.0.1:7443", description="host:port of the cloud's mutual-TLS port")
    server_name: ServerName = Field(
        default="", description="name in the cloud's certificate when it is not the host of `address`"
    )
    heartbeat_s: float = Field(default=30.0, gt=0, description="between heartbeats until the cloud says otherwise")
    poll_wait_s: float = Field(
        default=25.0, ge=0, le=200, description="how long the cloud may hold a poll; below NAT idle times (4 min)"
    )
    poll_pause_s: float = Field(default=1.0, ge=0, description="least pause after a poll that brought nothing at once")
    deadline_s: float = Field(
        default=30.0, gt=0, description="of any call, beyond a poll's wait and the time its bytes may take"
    )
    slowest_bytes_per_s: float = Field(default=4000.0, gt=0, description="a link this slow is still given its time: 32 kbit/s")
    retry_first_s: float = Field(default=1.0, gt=0, description="first delay after a failure, before jitter; doubles each time")
    retry_most_s: float = Field(
        default=60.0, gt=0, description="longest such delay: a cloud that returns is found within a minute"
    )
    refused_first_s: float = Field(
        default=30.0, gt=0, description="first delay after a refused release; the same answer would come again"
    )
    refused_most_s: float = Field(default=3600.0, gt=0, description="longest such delay")
    linger_s: float = Field(
        default=2.0, ge=0, description="wait for company of the first new sample: calls cost more than bytes"
    )
    batch_bytes: int = Field(
        default=100_000, ge=1024, le=32 * 2**20, description="of one upload: 50 to 150 KB is where loopback gRPC is fastest"
    )
    offer: int = Field(default=64, ge=1, le=256, description="headers per offer; the cloud accepts 256")
    renew: bool = Field(default=True, description="renew the device certificate after two thirds of its life")


class OutboxSettings(_Section):
    limit_bytes: int = Field(
        default=64 * 2**20, ge=0, description="samples kept while the cloud is away; the lowest scores go first"
    )
    bytes_per_hour: Annotated[int, Field(ge=0)] | Literal["unlimited"] = Field(
        default=64 * 2**20, description="sent per sliding hour, everything counted; 0 sends no samples or statistics"
    )

    @property
    def budget(self) -> int | None:
        """For `ByteBudget`: None is unlimited."""
        return None if self.bytes_per_hour == "unlimited" else self.bytes_per_hour


class SelectSettings(_Section):
    name: Literal["budget", "cema-paper", "cema-released", "eata"] = Field(
        default="budget", description="which frames are uploaded"
    )
    options: dict[str, float | int] = Field(default_factory=dict, description="fields of the selector's own settings")
    new_domain: int = Field(
        default=384,
        ge=0,
        le=100_000,
        description="random frames of a new domain kept besides, for its first release; 0: none",
    )
    new_domain_rate: float = Field(default=0.5, ge=0, le=1, description="of them per frame, as far as the hour's bytes go")


class EnrolSettings(_Section):
    address: EnrolAddress = Field(default="", description="host:port of the cloud's enrolment port")
    server_name: ServerName = Field(
        default="", description="name in the cloud's certificate when it is not the host of `address`"
    )
    ca: GivenFile | None = Field(
        default=None, description="the fleet authority's certificate (PEM), brought to the device by other means"
    )
    fingerprint: Fingerprint = Field(
        default="",
        description="instead of `ca`, or besides it: SHA-256 of the server's (or its authority's) certificate, in hex",
    )
    cohort: str = Field(default="", description="wished for; a token may prescribe another")
    name: str = Field(default="", description="begins the device's id; empty: the host's name")
