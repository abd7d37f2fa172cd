"""The three programs as the demo starts them: the same commands a person would use, and no setting but where things are.

What is set are addresses, ports, paths, credentials and the source of the frames; tests/demo/test_programs.py refuses others.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.assets import Assets
from demo.processes import Process, Processes, free_port, refold_command
from refold.errors import RefoldError, StorageError

__all__ = ["Cloud", "export_bundle", "start_cloud", "start_device"]

Tick = Callable[[], None]
EXPORT_SECONDS = 300.0
START_SECONDS = 60.0


@dataclass(frozen=True)
class Cloud:
    """A running service; `folder` is its fleet directory with the operator's certificate."""

    process: Process
    folder: Path
    config: Path
    port: int
    enrol_port: int


def export_bundle(processes: Processes, assets: Assets, work: Path, tick: Tick | None = None) -> Path:
    """Runs `refold export` on the student. Returns the bundle's path."""
    bundle = work / "student.refold"
    calibration = assets.write_calibration(work / "calibration.npz")
    command = refold_command(
        "export", assets.student.spec, "--weights", str(assets.student.weights), "--calibration", str(calibration),
        "--preprocess", "32x32,imagenet", "-o", str(bundle),
    )  # fmt: skip
    processes.run("export", command, EXPORT_SECONDS, tick)
    return bundle


def start_cloud(processes: Processes, assets: Assets, bundle: Path, work: Path) -> Cloud:
    """`refold cloud init`, `add-bundle` and `serve`; returns when the service takes connections."""
    folder = work / "cloud"
    port, enrol_port = free_port(), free_port()
    init = ["cloud", "init", str(folder), "--port", str(port), "--enrol-port", str(enrol_port)]
    processes.run("cloud-init", refold_command(*init), START_SECONDS)
    config = folder / "cloud.toml"
    teachers = [["--teacher", t.spec, "--teacher-weights", str(t.weights)] for t in assets.teachers]
    add = ["cloud", "add-bundle", str(bundle), "--config", str(config), *(word for t in teachers for word in t)]
    processes.run("cloud-add-bundle", refold_command(*add), EXPORT_SECONDS)  # loads torch and asks the teacher
    process = processes.start("cloud", refold_command("cloud", "serve", "--config", str(config)))
    _await_port(process, port)
    return Cloud(process, folder, config, port, enrol_port)


def start_device(
    processes: Processes, cloud: Cloud, bundle: Path, frames: Path, predictions: Path, fps: float, work: Path
) -> Process:
    """`refold cloud token`, `refold edge enrol` and `refold edge run`."""
    told = processes.run("token", refold_command("cloud", "token", "--json", "--config", str(cloud.config)), START_SECONDS)
    token = str(json.loads(told)["token"])
    data = work / "device"
    enrol = ["--data", str(data), "--cloud", f"127.0.0.1:{cloud.enrol_port}", "--ca", str(cloud.folder / "ca.pem")]
    processes.run("enrol", refold_command("edge", "enrol", *enrol, "--token", token, "--name", "demo"), START_SECONDS)
    values: dict[str, dict[str, str | float]] = {
        "": {"bundle": str(bundle), "data": str(data)},
        "source": {"path": str(frames), "fps": fps},  # fps: a file would be replayed faster than any camera
        "predictions": {"path": str(predictions)},
        "cloud": {"address": f"127.0.0.1:{cloud.port}"},
    }
    config = write_toml(work / "edge.toml", values)
    return processes.start("device", refold_command("edge", "run", "--config", str(config)))


def write_toml(path: Path, values: Mapping[str, Mapping[str, str | float]]) -> Path:
    """Sections of plain values; the section "" goes first, without a header."""
    lines: list[str] = []
    for section, entries in values.items():
        lines += [f"[{section}]"] if section else []
        lines += [f"{key} = {json.dumps(value)}" for key, value in entries.items()]
        lines.append("")
    try:
        path.write_text("\n".join(lines))
    except OSError as e:
        raise StorageError(f"{path} cannot be written: {e.strerror or e}.") from e
    return path


def _await_port(process: Process, port: int) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        process.must_run()
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if time.monotonic() > give_up:
                raise RefoldError(
                    f"The cloud did not open port {port} within {START_SECONDS:.0f} s: {process.tail()}. See {process.log}.",
                    code="process-slow",
                ) from None
            time.sleep(0.1)
