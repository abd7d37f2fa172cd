"""`refold cloud ...`: found a fleet, serve it, look after it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloud.fleet.operator_cli import operator
from cloud.fleet.options import config_option, json_option, say
from cloud.settings import CloudSettings, load_settings
from refold.errors import UsageError
from refold.network import check_host, join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud.training.trial import Trial
    from refold.bundle import Bundle

__all__ = ["cloud"]

set_option = click.option(
    "--set", "assignments", multiple=True, metavar="SECTION.NAME=VALUE", help="Any setting, over every other source; repeat."
)
PORT = click.IntRange(0, 65_535)


@click.group()
def cloud() -> None:
    """Run and steer the adaptation service."""


cloud.add_command(operator)


def _host(text: str, flag: str) -> str:
    try:
        return check_host(text)
    except ValueError as e:
        raise UsageError(f"{flag} {text!r}: {e}.", code="address") from e


@cloud.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", "hosts", multiple=True, help="Name or address devices use; repeat for several.")
@click.option("--address", help="Interface to listen on; default: loopback, or all interfaces when --host is given.")
@click.option("--port", default=7443, show_default=True, type=PORT, help="Devices and operators (mutual TLS).")
@click.option("--enrol-port", default=7444, show_default=True, type=PORT, help="Enrolment (server TLS).")
@json_option
def init(directory: Path, hosts: tuple[str, ...], address: str | None, port: int, enrol_port: int, as_json: bool) -> None:
    """Make the authority, certificates, signing key and settings of a new fleet in DIRECTORY."""
    from cloud.provision import LOCAL, default_hosts, provision

    hosts = tuple(_host(h, "--host") for h in hosts)
    address = None if address is None else _host(address, "--address")
    if port == enrol_port and port:
        raise UsageError(f"--port and --enrol-port are both {port}: devices and enrolment need a port each.")
    names = [*hosts, *LOCAL] if hosts else default_hosts()
    config = provision(
        directory, list(dict.fromkeys(names)), port, enrol_port, address or ("0.0.0.0" if hosts else "127.0.0.1")
    )
    values = {"config": str(config), "hosts": names, "release_key": (directory / "release.pub").read_text().strip()}
    text = (
        f"Fleet made in {directory} for {', '.join(dict.fromkeys(names))}. Keep ca.key and release.key to yourself.\n"
        f"  refold cloud add-bundle MODEL.refold --teacher SPEC --config {config}\n"
        f"  refold cloud serve --config {config}\n"
        f"  refold cloud token --config {config}        (once for each device that is to join)"
    )
    say(as_json, values, text)


@cloud.command("renew-server")
@click.option("--host", "hosts", multiple=True, help="Name or address devices use; repeat for several.")
@config_option
def renew_server_command(hosts: tuple[str, ...], config: Path) -> None:
    """Replace the server's certificate: for new names, or when it expired. Restart the service afterwards."""
    from cloud.identity import Authority
    from cloud.provision import LOCAL, default_hosts, renew_server

    tls = load_settings(config).tls
    hosts = tuple(_host(h, "--host") for h in hosts)
    names = [*hosts, *LOCAL] if hosts else default_hosts()
    renew_server(tls.certificate, tls.key, Authority.load(tls.ca, tls.ca_key), names)
    click.echo(f"{tls.certificate} is now for {', '.join(dict.fromkeys(names))}. Restart the service.")


@cloud.command()
@click.option("--cohort", default="", help="Cohort the device joins; default: the one it asks for.")
@click.option("--expires", default=24.0, show_default=True, help="Hours the token is good for.")
@click.option("--uses", default=1, show_default=True, help="Devices that may join with it.")
@config_option
@json_option
def token(cohort: str, expires: float, uses: int, config: Path, as_json: bool) -> None:
    """Make a join token; it is shown once and kept only as a hash."""
    from cloud.enrol import make_token
    from cloud.store import Store

    settings = load_settings(config)
    made = make_token(Store(settings.storage.database), cohort, expires, uses)
    say(as_json, {"token": made, "cohort": cohort, "hours": expires, "uses": uses, "ca": str(settings.tls.ca)}, made)


@cloud.command("add-bundle")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--teacher", "teachers", multiple=True, help="Exported program (.pt2) or file.py:callable; repeat for several.")
@click.option("--teacher-weights", "weights", multiple=True, help="One for each --teacher, in order; '' for none.")
@config_option
@json_option
def add_bundle(file: Path, teachers: tuple[str, ...], weights: tuple[str, ...], config: Path, as_json: bool) -> None:
    """Have the service adapt the bundle FILE. A running service needs no restart.

    Every teacher is loaded and run once on the bundle's calibration images; one that cannot teach is refused.
    """
    from cloud.bundles import checked, register
    from cloud.store import DirectoryObjects, Store

    if len(weights) not in (0, len(teachers)):
        raise UsageError(f"{len(teachers)} --teacher and {len(weights)} --teacher-weights: give one for each, or none.")
    settings = load_settings(config)
    pairs = list(zip(teachers, weights or [""] * len(teachers), strict=True))
    bundle = checked(file)
    trial = _try(bundle, pairs, settings) if pairs else None  # before anything is written
    objects = DirectoryObjects(settings.storage.objects, settings.storage.free_bytes)
    record = register(Store(settings.storage.database), objects, file, pairs)
    values: dict[str, Any] = {"digest": record.digest, "name": record.name, "teachers": [list(p) for p in record.teachers]}
    values |= trial.plain() if trial else {"student_accuracy": None, "trial": [], "warnings": []}
    lines = [t.sentence() for t in trial.teachers] if trial else []
    if trial and trial.student_accuracy is not None:
        lines.append(f"The exported model itself: right on {100 * trial.student_accuracy:.1f} %.")
    if not record.teachers:
        values["warnings"].append("Nobody teaches this bundle: no release comes until `add-bundle` names a --teacher.")
    lines += [f"Warning: {w}" for w in values["warnings"]]
    lines.append(f"{record.name} ({record.digest[:12]}) is adapted, taught by {len(record.teachers)} teacher(s).")
    say(as_json, values, "\n".join(lines))


def _try(bundle: Bundle, pairs: Sequence[tuple[str, str]], settings: CloudSettings) -> Trial:
    from cloud.bundles import absolute_teachers
    from cloud.gate import Gate
    from cloud.lesson import find_maker
    from cloud.training.trial import try_teachers

    maker = find_maker(settings.workers.distiller)
    slice_ = Gate(bundle, settings.gate, threads=settings.workers.threads).calibration
    return try_teachers(bundle, absolute_teachers(pairs), maker, settings.distil, *slice_)


@cloud.command()
@config_option
@click.option("--log-json", is_flag=True, help="One JSON object per line on stderr.")
@click.option("--log-level", default="INFO", show_default=True, type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]))
@set_option
@json_option
def serve(config: Path, log_json: bool, log_level: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Run the service until SIGTERM or Ctrl-C."""
    from cloud.logs import set_up

    set_up(log_level, as_json=log_json)
    settings = load_settings(config, assignments=assignments)
    asyncio.run(_serve(settings, as_json))


async def _serve(settings: CloudSettings, as_json: bool) -> None:
    from cloud.server import Cloud
    from cloud.systemd import notify

    service = Cloud(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await service.start()
        address = settings.server.address
        ready = {
            "event": "ready",
            "address": address,
            "port": service.port,
            "enrol_port": service.enrol_port,
            "pid": os.getpid(),
        }
        main, enrolment = join(address, service.port), join(address, service.enrol_port)
        say(as_json, ready, f"Ready: {main} (devices, operators), {enrolment} (enrolment).")
        sys.stdout.flush()
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
        logging.getLogger(__name__).info("stopping")
    finally:
        await service.close()


operator_option = click.option(
    "--operator",
    "certificate",
    type=click.Path(path_type=Path),
    envvar="REFOLD_OPERATOR",
    help="Your certificate (.pem), its key beside it (.key); default: operator.pem beside the settings.",
)


def _operator(config: Path, certificate: Path | None) -> Any:
    from cloud.client import Operator

    chosen = certificate or config.parent / "operator.pem"
    return Operator(load_settings(config), chosen, chosen.with_suffix(".key"))


@cloud.command()
@operator_option
@config_option
@json_option
def status(certificate: Path | None, config: Path, as_json: bool) -> None:
    """Devices and cohorts of a running service."""
    from google.protobuf.json_format import MessageToDict

    from cloud.show import show_status
    from refold.v1 import admin_pb2

    with _operator(config, certificate) as caller:
        answer = caller.call(caller.admin.Status, admin_pb2.StatusRequest())
    if as_json:
        click.echo(
            json.dumps(MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
        )
    else:
        show_status(answer)


@cloud.command()
@click.option("--bundle", default="", help="Digest of a bundle, or its beginning; default: all.")
@click.option("--cohort", default="", help="Default: all.")
@operator_option
@config_option
@json_option
def releases(bundle: str, cohort: str, certificate: Path | None, config: Path, as_json: bool) -> None:
    """Every release and every refused candidate, with the reason."""
    from google.protobuf.json_format import MessageToDict

    from cloud.show import show_releases
    from refold.v1 import admin_pb2

    with _operator(config, certificate) as caller:
        answer = caller.call(caller.admin.ListReleases, admin_pb2.ListReleasesRequest(cohort=cohort))
    rows = [r for r in answer.releases if r.bundle_digest.startswith(bundle)]
    if as_json:
        plain = [MessageToDict(r, preserving_proto_field_name=True, always_print_fields_with_no_presence=True) for r in rows]
        click.echo(json.dumps({"releases": plain}))
    else:
        show_releases(rows)


@cloud.command()
@click.argument("version", type=click.IntRange(min=0))
@click.option("--bundle", default="", help="Digest of the bundle, or its beginning; not needed where there is one.")
@click.option("--cohort", default="", help="Not needed where there is one.")
@click.option("--reason", default="", help="Kept with the releases that are taken back.")
@operator_option
@config_option
@json_option
def rollback(
    version: int, bundle: str, cohort: str, reason: str, certificate: Path | None, config: Path, as_json: bool
) -> None:
    """Point a cohort at the earlier VERSION; 0 is the model as exported."""
    from refold.v1 import admin_pb2

    with _operator(config, certificate) as caller:
        known = caller.call(caller.admin.Status, admin_pb2.StatusRequest()).cohorts
        fits = [c for c in known if c.bundle_digest.startswith(bundle) and cohort in ("", c.cohort)]
        if len(fits) != 1:
            names = ", ".join(f"--bundle {c.bundle_digest[:12]} --cohort {c.cohort}" for c in fits or known) or "none yet"
            raise UsageError(f"{'Several cohorts fit' if fits else 'No cohort fits'}; known: {names}.", code="which-cohort")
        request = admin_pb2.RollbackRequest(
            bundle_digest=fits[0].bundle_digest, cohort=fits[0].cohort, to_version=version, reason=reason
        )
        answer = caller.call(caller.admin.Rollback, request)
    values = {"bundle_digest": fits[0].bundle_digest, "cohort": fits[0].cohort, "current_version": answer.current_version}
    where = f"version {answer.current_version}" if answer.current_version else "the exported state"
    say(as_json, values, f"Cohort {fits[0].cohort} is at {where}; devices follow at their next poll.")


@cloud.command()
@click.argument("device")
@config_option
def revoke(device: str, config: Path) -> None:
    """Shut DEVICE out, at once and for ever; it can enrol again under a new key."""
    from cloud.store import Store

    if not Store(load_settings(config).storage.database).revoke(device):
        raise UsageError(f"There is no device {device!r}: see `refold cloud status`.", code="no-device")
    click.echo(f"{device} is revoked.")


@cloud.command()
@config_option
@json_option
def gc(config: Path, as_json: bool) -> None:
    """Apply the retention settings now (a running service does so by itself)."""
    from cloud.retention import collect
    from cloud.store import DirectoryObjects, Store

    storage = load_settings(config).storage
    done = collect(Store(storage.database), DirectoryObjects(storage.objects), storage)
    values = {"samples": done.samples, "statistics": done.statistics, "objects": done.objects}
    say(as_json, values, f"Forgot {done.samples} samples, {done.statistics} reports and {done.objects} files.")
