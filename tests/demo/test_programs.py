"""The demo shows what a user gets: its programs run with default settings, but for addresses, paths, credentials and frames."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cloud.settings import CloudSettings
from cloud.settings import load_settings as load_cloud
from demo import programs as module
from demo.assets import Assets, Network
from demo.processes import Processes, default_environment
from demo.programs import export_bundle, start_cloud, start_device
from edge.link_settings import LinkSettings
from edge.settings import EdgeSettings
from edge.settings import load_settings as load_edge
from refold.cli import cli
from refold.configuration import read_toml

EDGE_OWN = {"bundle", "data", "source.path", "source.fps", "predictions.path", "cloud.address"}
CLOUD_OWN = {"server.address", "server.port", "server.enrol_port"}
OPTIONS = {
    "export": {"--weights", "--calibration", "--preprocess", "-o"},  # what the network is, and of what it is calibrated
    "cloud-init": {"--port", "--enrol-port"},
    "cloud-add-bundle": {"--config", "--teacher", "--teacher-weights"},
    "cloud": {"--config"},
    "token": {"--json", "--config"},
    "enrol": {"--data", "--cloud", "--ca", "--token", "--name"},
    "device": {"--config"},
}


class Recorder:
    """Stands in for `Processes`: keeps every command, and runs the one that writes the cloud's settings."""

    def __init__(self) -> None:
        self.commands: dict[str, list[str]] = {}

    def start(self, name: str, command: Sequence[str]) -> None:
        self.commands[name] = list(command[command.index("refold.cli") + 1 :])

    def run(self, name: str, command: Sequence[str], timeout: float, tick: object = None) -> str:
        self.start(name, command)
        if name == "cloud-init":
            done = CliRunner().invoke(cli, self.commands[name])
            assert done.exit_code == 0, done.output
        return json.dumps({"token": "a-token"})


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Every program of the demo, as it starts them, in `tmp_path`."""
    monkeypatch.setattr(module, "_await_port", lambda process, port: None)
    images, labels = np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64)
    network = Network("models.py:net", tmp_path / "net.npz")
    assets = Assets("none", images, labels, (images, labels), network, (network,))
    recorder: Any = Recorder()
    bundle = export_bundle(recorder, assets, tmp_path)
    cloud = start_cloud(recorder, assets, bundle, tmp_path)
    start_device(recorder, cloud, bundle, tmp_path / "frames.npy", tmp_path / "lines.jsonl", 30.0, tmp_path)
    found: Recorder = recorder
    return found


def _names(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield from _names(value, f"{before}{key}.") if isinstance(value, dict) else (f"{before}{key}",)


def _different(values: Mapping[str, Any], defaults: Mapping[str, Any], before: str = "") -> set[str]:
    """Dotted names of the settings that have another value than their default."""
    found = set()
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults[key], dict):
            found |= _different(value, defaults[key], f"{before}{key}.")
        elif value != defaults[key]:
            found.add(before + key)
    return found


def test_the_device_is_told_only_where_things_are(started: Recorder, tmp_path: Path) -> None:
    assert set(_names(read_toml(tmp_path / "edge.toml"))) == EDGE_OWN
    settings = load_edge(tmp_path / "edge.toml", environment={})
    linked = EdgeSettings(cloud=LinkSettings())
    assert _different(settings.model_dump(), linked.model_dump()) == EDGE_OWN


def test_the_cloud_is_told_only_where_it_listens(started: Recorder, tmp_path: Path) -> None:
    config = tmp_path / "cloud" / "cloud.toml"
    assert set(_names({k: v for k, v in read_toml(config).items() if v})) <= CLOUD_OWN
    defaults = CloudSettings().anchored(config.parent)
    assert _different(load_cloud(config, {}).model_dump(), defaults.model_dump()) <= CLOUD_OWN


def test_no_option_sets_anything_else(started: Recorder) -> None:
    assert set(started.commands) == set(OPTIONS)
    for name, command in started.commands.items():
        assert {word for word in command if word.startswith("-")} == OPTIONS[name], name


def test_settings_in_the_environment_do_not_reach_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOLD_CLOUD_DISTIL__STEPS", "12")
    monkeypatch.setenv("REFOLD_EDGE_SELECT__NEW_DOMAIN", "128")
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    with Processes(tmp_path) as processes:
        environ = json.loads(processes.run("env", [sys.executable, "-c", script], 30))
    assert not [name for name in environ if name.startswith(("REFOLD_CLOUD_", "REFOLD_EDGE_"))]
    assert default_environment({"REFOLD_DATA": "/data"}) == {"REFOLD_DATA": "/data", "PYTHONUNBUFFERED": "1"}
