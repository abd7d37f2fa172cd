"""The three programs as the demo starts them: the same commands and settings files a person would use."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.assets import Assets
from demo.processes import Process, Processes, free_port, refold_command
from refold.errors import RefoldError, StorageError

__all__ = ["Cloud", "export_bundle", "start_cloud", "start_device"]

Tick = Callable[[], None]
EXPORT_SECONDS = 300.0
START_SECONDS = 60.0
# A fleet trains every ten minutes or so and hears of it within one; a demo has minutes in all.
CLOUD: dict[str, dict[str, Any]] = {
    "workers": {"look_s": 0.5, "interval_s": 2.0, "home": False, "nice": 3},
    "devices": {"heartbeat_ms": 2000, "poll_wait_ms": 5000, "poll_next_ms": 200},
    "quota": {"calls_per_minute": 2400.0},
    # A dozen held-out images rule out no loss of four points: a demo has no time to wait for more, and says so.
    "gate": {"held_back": 12, "tolerated_points": 10.0, "shifted_clean_points": 8.0},
    # Trainings go on from the last release: twenty steps on so few pictures overshot, and the gate refused them.
    "distil": {"fresh_samples": 32, "growth": 1.2, "steps": 12, "group": 24, "restyled": 0.0, "flips": False},
}
DEVICE: dict[str, dict[str, Any]] = {
    "predictions": {"flush_ms": 100},
    "metrics": {"status_s": 0.5},
    "select": {"new_domain": 128},  # of a thousand frames of fog; a fleet has longer
    "select.options": {"rate": 0.15, "unbiased": 0.5},
    "cloud": {"heartbeat_s": 2.0, "poll_wait_s": 5.0, "poll_pause_s": 0.2, "linger_s": 0.5},
}


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
    processes.run("cloud-add-bundle", refold_command(*add), START_SECONDS)
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
    values: dict[str, dict[str, Any]] = {
        "": {"bundle": str(bundle), "data": str(data)},
        "source": {"path": str(frames), "fps": fps},
        "predictions": {**DEVICE["predictions"], "path": str(predictions)},
        "metrics": DEVICE["metrics"],
        "select": DEVICE["select"],
        "select.options": DEVICE["select.options"],
        "cloud": {**DEVICE["cloud"], "address": f"127.0.0.1:{cloud.port}"},
    }
    config = write_toml(work / "edge.toml", values)
    return processes.start("device", refold_command("edge", "run", "--config", str(config)))


def write_toml(path: Path, values: Mapping[str, Mapping[str, Any]]) -> Path:
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


def environment(program: str, values: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Settings as REFOLD_<PROGRAM>_<SECTION>__<KEY>."""
    return {
        f"REFOLD_{program.upper()}_{section.upper()}__{key.upper()}": json.dumps(value)
        for section, entries in values.items()
        for key, value in entries.items()
    }


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
