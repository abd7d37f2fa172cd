"""Settings: the file, the environment, and what a mistake in either is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud.settings import load_settings
from refold.errors import UsageError


def write(path: Path, text: str) -> Path:
    file = path / "cloud.toml"
    file.write_text(text)
    return file


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, '[[bundle]]\npath = "m.refold"\nteachers = [{ spec = "t.pt2" }]\n'), {})
    assert settings.tls.ca == tmp_path / "ca.pem" and settings.storage.objects == tmp_path / "objects"
    assert settings.storage.database == f"sqlite:///{tmp_path / 'refold.db'}"
    assert settings.bundle[0].path == tmp_path / "m.refold" and settings.bundle[0].teachers[0].spec == "t.pt2"


def test_other_databases_are_left_alone(tmp_path: Path) -> None:
    for url in ("postgresql+psycopg://u:p@h/d", "sqlite:////abs/x.db"):
        assert load_settings(write(tmp_path, f'[storage]\ndatabase = "{url}"\n'), {}).storage.database == url


def test_the_environment_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "[server]\nport = 1\n")
    environment = {
        "REFOLD_CLOUD_SERVER__PORT": "2",
        "REFOLD_CLOUD_WORKERS__MODE": "thread",
        "REFOLD_CLOUD_DISTIL__STEPS": "7",
        "REFOLD_CLOUD_STORAGE__RETENTION_DAYS": "0.5",
    }
    settings = load_settings(file, environment)
    assert (settings.server.port, settings.workers.mode, settings.storage.retention_days) == (2, "thread", 0.5)
    assert settings.distil == {"steps": 7}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[sever]\nport = 1", "did you mean server?"),
        ("[server]\nprot = 1", "did you mean server.port?"),
        ("[gate]\nxyz = 1", "known are: held_back"),
        ("[server]\nport = 70000", "server.port is 70000: Input should be less than or equal to 65535"),
        ("[server]\nport = 'x'", "server.port"),
        ("[[bundle]]\npath = 'x'\nteacher = []", "did you mean bundle.0.teachers?"),
        ("[[bundle]]\npath = 'x'\nteachers = [{ spec = 'y', wieghts = 'z' }]", "did you mean bundle.0.teachers.0.weights?"),
        ("[server\n", "is not TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part.replace("?", r"\?")) as e:
        load_settings(write(tmp_path, text), {})
    assert str(tmp_path / "cloud.toml") in e.value.message


def test_a_mistake_in_the_environment_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "")
    with pytest.raises(UsageError, match=r"did you mean server\.port"):
        load_settings(file, {"REFOLD_CLOUD_SERVER__PROT": "1"})
    with pytest.raises(UsageError, match=r"bundle is not a table"):
        load_settings(write(tmp_path, "[[bundle]]\npath = 'x'"), {"REFOLD_CLOUD_BUNDLE__PATH": "y"})


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="refold cloud init"):
        load_settings(tmp_path / "cloud.toml", {})
