"""The service's TLS files in every state: all of them fit together, or nothing is served."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cloud.client import Operator
from cloud.provision import LOCAL, provision
from cloud.server import Cloud
from cloud.settings import TlsSettings, load_settings
from refold.errors import NetworkError, UsageError
from refold.v1 import admin_pb2

FILES = ("ca", "ca_key", "certificate", "key", "release_key")
STATES = ("unset variable", "missing", "empty file", "directory", "no PEM", "another fleet's")


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fleets")
    for name in ("own", "other"):
        provision(folder / name, LOCAL, 0, 0, "127.0.0.1")
    return folder / "own", folder / "other"


def value_for(state: str, folder: Path, own: Path, other: Path) -> str:
    path = folder / "file"
    if state == "empty file":
        path.write_bytes(b"")
    elif state == "no PEM":
        path.write_text("-----BEGIN NOTHING-----\n")
    elif state == "directory":
        path.mkdir()
    elif state == "another fleet's":
        shutil.copy(other / own.name, path)
    return "" if state == "unset variable" else str(path)


def test_all_files_are_covered() -> None:
    assert set(FILES) == set(TlsSettings.model_fields) - {"more_release_keys", "device_days"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
def test_one_file_that_does_not_fit_keeps_the_service_from_starting(
    name: str, state: str, fleets: tuple[Path, Path], tmp_path: Path
) -> None:
    own, other = fleets
    if (name, state) == ("release_key", "another fleet's"):
        return  # a key of its own is all that is asked for
    usual = own / Path(getattr(TlsSettings(), name)).name
    value = value_for(state, tmp_path, usual, other)
    with pytest.raises(UsageError) as e:
        Cloud(load_settings(own / "cloud.toml", {f"REFOLD_CLOUD_TLS__{name.upper()}": value}))
    assert "\n" not in e.value.message and not (own / "refold.db").exists()
    if state == "unset variable":
        assert f"REFOLD_CLOUD_TLS__{name.upper()}: tls.{name} is ''" in e.value.message


@pytest.mark.parametrize("state", STATES[1:])
@pytest.mark.parametrize("name", ["operator.pem", "operator.key", "ca.pem"])
def test_an_operator_with_a_file_that_does_not_fit(name: str, state: str, fleets: tuple[Path, Path], tmp_path: Path) -> None:
    own, other = fleets
    value = Path(value_for(state, tmp_path, own / name, other))
    files = {f: own / f for f in ("operator.pem", "operator.key")} | ({name: value} if name != "ca.pem" else {})
    environment = {"REFOLD_CLOUD_SERVER__PORT": "1"} | ({"REFOLD_CLOUD_TLS__CA": str(value)} if name == "ca.pem" else {})
    settings = load_settings(own / "cloud.toml", environment)
    if (name, state) == ("ca.pem", "another fleet's"):
        return  # told by the handshake, where there is somebody to shake hands with
    with pytest.raises(UsageError):
        Operator(settings, files["operator.pem"], files["operator.key"])


def test_an_operator_is_told_why_nobody_answers(fleets: tuple[Path, Path]) -> None:
    own, _ = fleets
    settings = load_settings(own / "cloud.toml", {"REFOLD_CLOUD_SERVER__PORT": "1"})
    refused = pytest.raises(NetworkError, match=r"127\.0\.0\.1:1: .*Connection refused.*refold cloud serve")
    with Operator(settings, own / "operator.pem", own / "operator.key") as operator, refused:
        operator.call(operator.admin.Status, admin_pb2.StatusRequest())
    with pytest.raises(UsageError, match=r"server\.port is 0"):
        Operator(load_settings(own / "cloud.toml", {}), own / "operator.pem", own / "operator.key")
