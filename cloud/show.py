"""Tables for people: `refold cloud status` and `refold cloud releases`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from refold.v1 import admin_pb2 as pb

__all__ = ["show_operators", "show_releases", "show_status"]


def _ago(unix_ms: int) -> str:
    if not unix_ms:
        return "never"
    seconds = max(0.0, time.time() - unix_ms / 1000)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _console(console: Console | None) -> Console:
    """rich, on the width of the terminal; a pipe gets whole lines instead of cut ones."""
    chosen = console or Console(markup=False, emoji=False)  # a device's words are words
    if not chosen.is_terminal:
        chosen.width = 200
    return chosen


def show_status(status: pb.StatusResponse, console: Console | None = None) -> None:
    out = _console(console)
    cohorts = Table("bundle", "cohort", "release", "samples", "bytes", "reports", "distiller", "last decision", title="Cohorts")
    for c in status.cohorts:
        release = str(c.current_version) if c.current_version else "as exported"
        name = f"{c.bundle_name} {c.bundle_digest[:8]}"
        row = (name, c.cohort, release, f"{c.samples:,}", f"{c.sample_bytes:,}", f"{c.statistics_reports:,}")
        cohorts.add_row(*row, c.distiller, c.last_gate or "none yet")
    devices = Table("device", "cohort", "bundle", "release", "domain", "last seen", "last error", title="Devices")
    for d in status.devices:
        row = (d.device_id, d.cohort, d.bundle_digest[:8], str(d.release_version), d.domain, _ago(d.last_seen_unix_ms))
        devices.add_row(*row, d.last_error)
    for warning in status.warnings:
        out.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False)
    out.print(cohorts if status.cohorts else "No samples or statistics have come in yet.")
    out.print(devices if status.devices else "No device has enrolled yet: `refold cloud token`.")


def show_operators(rows: Sequence[tuple[str, ...]], console: Console | None = None) -> None:
    """Rows of name, role, serial number, day of expiry and state."""
    out = _console(console)
    table = Table("operator", "may", "serial", "expires", "state", title="Operators")
    for row in rows:
        table.add_row(row[0], "everything" if row[1] == "operator" else row[1], *row[2:])
    out.print(table if rows else "No operator is known yet: `refold cloud operator issue NAME`.")


def _until(r: pb.ReleaseRow) -> str:
    """The day after which no device installs it; what the cloud still hands out is renewed with every poll."""
    if not r.version:
        return "-"
    if not r.expires_unix_ms:
        return "for ever"
    day = time.strftime("%Y-%m-%d", time.gmtime(r.expires_unix_ms / 1000))
    return f"{day}, renewed" if r.state in ("current", "superseded") else day


def show_releases(rows: Sequence[pb.ReleaseRow], console: Console | None = None) -> None:
    out = _console(console)
    if not rows:
        out.print("No releases yet.")
        return
    columns = ("version", "cohort", "domain", "state", "made", "installable until", "bytes", "samples", "frames", "reason")
    table = Table(*columns, title="Releases")
    for r in rows:
        made = time.strftime("%m-%d %H:%M:%S", time.gmtime(r.created_unix_ms / 1000))
        evidence = (f"{r.evidence.samples:,}", f"{r.evidence.statistics_frames:,}")
        version = str(r.version) if r.version else "-"
        row = (version, r.cohort, r.domain or "all", r.state, made, _until(r), f"{r.bytes:,}")
        table.add_row(*row, *evidence, r.reason)
    out.print(table)
