"""`refold edge`: run the daemon, ask it how it is, enrol it, take a release back."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from edge.experts.cli import experts
from edge.experts.generate_cli import generate
from edge.experts.serve_cli import serve_llm
from edge.settings import EdgeSettings, load_settings
from refold.errors import UsageError

__all__ = ["FLAGS", "edge"]

# The setting behind each flag of `run`, and the value that a flag without one stands for.
FLAGS: dict[str, tuple[tuple[str, ...], Any]] = {
    "bundle": (("bundle",), None),
    "data": (("data",), None),
    "source": (("source", "path"), None),
    "watch": (("source", "watch"), True),
    "loop": (("source", "loop"), True),
    "fps": (("source", "fps"), None),
    "max_frames": (("source", "max_frames"), None),
    "predictions": (("predictions", "path"), None),
    "cloud": (("cloud", "address"), None),
    "selector": (("select", "name"), None),
    "target": (("engine", "target"), None),
    "threads": (("engine", "threads"), None),
    "oip_port": (("inference", "port"), None),
    "metrics_port": (("metrics", "port"), None),
    "no_adapt": (("adapt", "enabled"), False),
    "inline": (("mode",), "inline"),
}

STALE = 11  # docs/errors.md


@click.group()
def edge() -> None:
    """Run a bundle on this device: predict, adapt, pick samples, apply releases."""


for command in (experts, generate, serve_llm):
    edge.add_command(command)


set_option = click.option(
    "--set", "assignments", multiple=True, metavar="SECTION.NAME=VALUE", help="Any setting, over every other source; repeat."
)


def _common(command: Any) -> Any:
    for option in (
        click.option("--config", type=click.Path(path_type=Path), help="TOML file; flags and REFOLD_EDGE_* override it."),
        click.option("--bundle", type=click.Path(), help="The .refold file to run."),
        click.option("--data", type=click.Path(), help="Directory for everything kept across restarts."),
        set_option,
    ):
        command = option(command)
    return command


@edge.command()
@_common
@click.option("--source", help="Folder of images, .npz or .npy, video file, camera:N, or none.")
@click.option("--watch", is_flag=True, default=None, help="Go on with pictures that arrive in the folder later.")
@click.option("--loop", is_flag=True, default=None, help="Begin again at the end of the source.")
@click.option("--once", is_flag=True, help="Serve the source once and end (the default; undoes `loop` and `watch` of a file).")
@click.option("--fps", type=float, help="Frames per second at most.")
@click.option("--max-frames", type=int, help="End after so many frames.")
@click.option("--predictions", help="File for one line of JSON per frame; - for standard output.")
@click.option("--cloud", help="host:port of the adaptation service.")
@click.option("--selector", help="cema-paper, cema-released, eata or budget.")
@click.option("--target", help="Target within the bundle.")
@click.option("--threads", type=int, help="Threads of one inference.")
@click.option("--oip-port", type=int, help="Serve the Open Inference Protocol here; 0 for any free port.")
@click.option("--metrics-port", type=int, help="Serve Prometheus metrics here; 0 for any free port.")
@click.option("--no-adapt", is_flag=True, help="Serve releases only; no adaptation of the device's own.")
@click.option("--inline", is_flag=True, help="Do everything between frames, repeatably; for tests and benchmarks.")
@click.option("--json", "as_json", is_flag=True, help="Print the final status as JSON.")
def run(**flags: Any) -> None:
    """Serve frames until the source ends or a signal comes."""
    settings = _settings(flags)
    from edge.daemon import Daemon  # ONNX Runtime and gRPC load only when something runs

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger().setLevel(min(logging.getLogger().level or logging.WARNING, logging.INFO))
    with Daemon(settings, stop) as daemon:
        click.echo(_opening(daemon), err=True)
        frames = daemon.run()
    status = daemon.final_status
    if flags["as_json"]:
        click.echo(json.dumps(status))
        return
    m = status["metrics"]
    for problem in status["problems"]:
        click.echo(f"Still wrong at the end: {problem}", err=True)
    click.echo(
        f"Served {frames} frames ({m['pictures_skipped']:.0f} pictures skipped, {m['frames_lost']:.0f} frames lost), "
        f"{m['latency_p50_ms']:.2f} ms each, {m['swaps']:.0f} engine swaps, release {status['release_version']}, "
        f"domain {status['domain']}.{_dropped(status)}",
        err=True,
    )


def _dropped(status: dict[str, Any]) -> str:
    """What workers were too far behind for, and for looks how they would have been taken."""
    said, looks = "", status["looks_dropped"]
    if looks:
        said += (
            f" The adaptation was behind: {looks} looks at frames were dropped, so that it adapted to fewer of them than came. "
            "A file without --fps waits for it; so does any source with --set source.waits=yes."
        )
    for name, what in {"samples_dropped": "kept samples", "predictions_dropped": "lines of predictions"}.items():
        if status["metrics"].get(name):
            said += f" {status['metrics'][name]:.0f} {what} were dropped: the disk was behind."
    return said


def _opening(daemon: Any) -> str:
    parts = [f"Serving {daemon.bundle.manifest.name} ({daemon.factory.target}), release {daemon.status()['release_version']}"]
    if daemon.inference:
        parts.append(f"inference on port {daemon.inference.port}")
    if daemon.metrics_server:
        parts.append(f"metrics on port {daemon.metrics_server.port}")
    return ", ".join(parts) + "."


def _settings(flags: dict[str, Any]) -> EdgeSettings:
    nested: dict[str, Any] = {}
    names: dict[tuple[str, ...], str] = {}

    def give(path: tuple[str, ...], value: Any, flag: str) -> None:
        table = nested
        for name in path[:-1]:
            table = table.setdefault(name, {})
        table[path[-1]] = value
        names[path] = flag

    for flag, (path, meant) in FLAGS.items():
        value = flags.get(flag)
        if value is not None and not (value is False and meant is not None):
            give(path, value if meant is None else meant, f"--{flag.replace('_', '-')}")
    if flags.get("once"):
        for flag in ("watch", "loop"):
            if flags.get(flag):
                raise UsageError(f"--once and --{flag} contradict each other: give one of them.")
            give(FLAGS[flag][0], False, "--once")
    return load_settings(flags.get("config"), nested, flag_names=names, assignments=flags.get("assignments") or ())


@edge.command()
@_common
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def status(as_json: bool, **flags: Any) -> None:
    """Ask the daemon how it is, or print what it last wrote.

    Ends with 11 when what it prints is stale: no daemon runs and the last one did not end by itself, or one runs that neither
    answers nor writes.
    """
    from edge.runtime.query import find_status

    settings = _settings(flags)
    told, staleness = find_status(Path(settings.data))
    if as_json:
        click.echo(json.dumps(told))
    else:
        for key, value in told.items():
            if key not in ("metrics", "problems"):
                click.echo(f"{key:<20} {value}")
        for problem in told.get("problems", []):
            click.echo(f"{'problem':<20} {problem}")
        for key, value in sorted(told.get("metrics", {}).items()):
            click.echo(f"{key:<28} {value:.6g}")
    if staleness.reason:
        click.echo(f"refold: {staleness.sentence()}", err=True)
        sys.exit(STALE)


@edge.command()
@click.option("--config", type=click.Path(path_type=Path), help="TOML file; its [enrol] section is used.")
@click.option("--data", type=click.Path(), help="Directory for everything kept across restarts.")
@click.option("--cloud", help="host:port of the cloud's enrolment port.")
@click.option("--token", required=True, envvar="REFOLD_JOIN_TOKEN", help="One-time join token (or REFOLD_JOIN_TOKEN).")
@click.option("--ca", type=click.Path(), help="The fleet authority's certificate (PEM).")
@click.option("--fingerprint", help="Instead of --ca, or besides it: SHA-256 of the server's certificate, in hex.")
@click.option("--cohort", help="Cohort wished for; the token may prescribe another.")
@click.option("--name", help="Begins the device's id; default: the host's name.")
@set_option
def enrol(
    config: Path | None, data: str | None, token: str, cloud: str | None, assignments: tuple[str, ...], **wishes: Any
) -> None:
    """Exchange a join token for this device's certificate and the release keys it trusts."""
    from edge.enrol import enrol as buy

    names: dict[tuple[str, ...], str] = {("enrol", "address"): "--cloud", ("data",): "--data"}
    names |= {("enrol", name): f"--{name}" for name in wishes}
    flags = {"data": data, "enrol": {"address": cloud, **wishes}}
    settings = load_settings(config, flags, flag_names=names, assignments=assignments)
    identity = buy(settings.enrol, token, settings.identity_folder)
    click.echo(f"Enrolled as {identity.device_id} in cohort {identity.cohort}; the identity is in {settings.identity_folder}.")


@edge.command()
@_common
def rollback(**flags: Any) -> None:
    """Refuse the release in use for ever and go back to the one before."""
    from edge.cloud_link import roll_back

    click.echo(roll_back(_settings(flags)))
