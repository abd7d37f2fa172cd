"""Every setting of device and service, generated from their definitions: file, environment and flag give one typed value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
from click.testing import CliRunner

import cloud.settings
import edge.cli
import edge.settings
from cloud.distil.settings import DistilSettings
from refold.configuration import leaves
from refold.configuration.schema import members
from refold.errors import UsageError

ROOT = Path(__file__).parents[2]
KEY = "ab" * 32
GIVEN: dict[str, Any] = {  # values that a definition's types and bounds do not tell
    "bundle": "m.refold",
    "cloud.address": "cloud.example.org:7000",
    "cloud.server_name": "cloud.example.org",
    "enrol.address": "[::1]:7000",
    "enrol.server_name": "cloud.example.org",
    "enrol.fingerprint": KEY,
    "inference.host": "0.0.0.0",
    "metrics.host": "::1",
    "select.options": {"rate": 0.25, "burst": 3},
    "server.address": "0.0.0.0",
    "tls.more_release_keys": (KEY, "cd" * 32),
    "workers.distiller": "cloud.lesson:make_lesson",
    "distil.mixes": (0.25, 0.5),
    "distil.modifiers": ("label-shift", "teacher-weights"),
    "distil.options": {"rate": 0.25, "pull": 0.5},
    "storage.database": "postgresql+psycopg://user:word@host/name",
}


WITH = {  # what a setting cannot stand without
    "inference.certificate": {"inference.key": "key.pem"},
    "inference.key": {"inference.certificate": "certificate.pem"},
    "inference.client_ca": {"inference.key": "key.pem", "inference.certificate": "certificate.pem"},
    "distil.options": {"distil.recipe": "roid"},
}


class Leaf(NamedTuple):
    program: str
    path: tuple[str, ...]
    annotation: Any

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def variable(self) -> str:
        return f"REFOLD_{self.program.upper()}_{'__'.join(self.path).upper()}"


def all_leaves() -> Iterator[Leaf]:
    for path, annotation in leaves(edge.settings.EdgeSettings):
        yield Leaf("edge", path, annotation)
    for path, annotation in leaves(cloud.settings.CloudSettings):
        if path not in (("distil",), ("bundle",)):
            yield Leaf("cloud", path, annotation)
    for path, annotation in leaves(DistilSettings):
        yield Leaf("cloud", ("distil", *path), annotation)


ALL = list(all_leaves())


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def load(leaf: Leaf, text: str = "", environment: dict[str, str] | None = None, **more: Any) -> Any:
        file = tmp_path / f"{leaf.program}.toml"
        with_it = "".join(f"{name} = {value!r}\n" for name, value in WITH.get(leaf.name, {}).items())
        file.write_text(with_it + text)
        if leaf.program == "edge":
            return edge.settings.load_settings(file, {}, environment or {}, **more)
        return cloud.settings.load_settings(file, environment or {}, **more)

    return load


def value_at(settings: Any, leaf: Leaf) -> Any:
    for name in leaf.path:
        settings = settings[name] if isinstance(settings, dict) else getattr(settings, name)
    return settings


def default_of(leaf: Leaf) -> Any:
    if leaf.path[0] == "distil":
        return getattr(DistilSettings(), leaf.path[1])
    if leaf.path[:1] in (("cloud",), ("select",)) and leaf.program == "edge":
        section = edge.settings.LinkSettings if leaf.path[0] == "cloud" else edge.settings.SelectSettings
        return getattr(section(), leaf.path[1])
    return value_at(edge.settings.EdgeSettings() if leaf.program == "edge" else cloud.settings.CloudSettings(), leaf)


def candidates(leaf: Leaf) -> Iterator[Any]:
    default, kinds = default_of(leaf), members(leaf.annotation)
    if leaf.name in GIVEN:
        yield GIVEN[leaf.name]
    for kind in kinds:
        if kind is bool:
            yield not default
        elif get_origin(kind) is Literal:
            yield from (v for v in get_args(kind) if v != default)
        elif kind is int:
            yield from (n for n in ((default or 0) + 1, (default or 0) // 2, 2, 8) if n != default)
        elif kind is float:
            yield from (n for n in (default / 2, default * 2, 0.5, 1.5) if n != default)
        elif kind in (str, Path):
            yield kind("some where/file")


def as_toml(leaf: Leaf, value: Any) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{k} = {plain(v)}" for k, v in value.items()) + " }"
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(map(plain, value)) + "]"
        return json.dumps(value if isinstance(value, (bool, int, float)) else str(value))

    return f"{leaf.name} = {plain(value)}\n"


def as_text(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def relative_to_the_file(leaf: Leaf, value: Any, folder: Path) -> Any:
    """What a path in a file means: a variable's or a flag's is relative to the working directory instead."""
    paths = {".".join(path) for path in edge.settings.PATHS}
    return type(value)(folder / value) if leaf.program == "edge" and leaf.name in paths else value


@pytest.mark.parametrize("leaf", ALL, ids=[f"{leaf.program}-{leaf.name}" for leaf in ALL])
def test_a_value_is_the_same_from_every_source(leaf: Leaf, load: Callable[..., Any], tmp_path: Path) -> None:
    refusals = []
    for value in candidates(leaf):
        try:
            from_file = value_at(load(leaf, as_toml(leaf, value)), leaf)
        except UsageError as e:
            refusals.append(e.message)
            continue
        break
    else:
        pytest.fail(f"no value that {leaf.name} accepts: {refusals}")
    from_environment = value_at(load(leaf, environment={leaf.variable: as_text(value)}), leaf)
    from_flag = value_at(load(leaf, assignments=[f"{leaf.name}={as_text(value)}"]), leaf)
    over_both = value_at(
        load(leaf, as_toml(leaf, value), {leaf.variable: "no such value"} if leaf.name == "data" else {},
             assignments=[f"{leaf.name}={as_text(value)}"]),
        leaf,
    )  # fmt: skip
    expected = relative_to_the_file(leaf, from_environment, tmp_path)
    assert from_file == expected and type(from_file) is type(expected)
    assert from_environment == from_flag == over_both and type(from_environment) is type(from_flag)
    if leaf.name != "workers.distiller":
        assert from_environment != default_of(leaf)


def wrong_for(leaf: Leaf) -> tuple[Any, str] | None:
    """(value for a file, text for a variable) that no setting of this type accepts."""
    kinds = members(leaf.annotation)
    if any(k in (int, float, bool) or get_origin(k) is Literal for k in kinds):
        return "no such value", "no such value"
    if any(k in (str, Path) for k in kinds):
        return None  # most texts are a text
    return 5, "5"


@pytest.mark.parametrize("leaf", ALL, ids=[f"{leaf.program}-{leaf.name}" for leaf in ALL])
def test_a_wrong_value_is_refused_with_setting_and_source(leaf: Leaf, load: Callable[..., Any], tmp_path: Path) -> None:
    wrong = wrong_for(leaf)
    if wrong is None:
        with pytest.raises(UsageError) as e:
            load(leaf, as_toml(leaf, 5))
        assert leaf.name in e.value.message and f"{leaf.program}.toml" in e.value.message
        return
    value, text = wrong
    sources: list[tuple[str, dict[str, Any]]] = [
        (f"{leaf.program}.toml", {"text": as_toml(leaf, value)}),
        (leaf.variable, {"environment": {leaf.variable: text}}),
        (f"--set {leaf.name}", {"assignments": [f"{leaf.name}={text}"]}),
    ]
    for source, given in sources:
        with pytest.raises(UsageError) as e:
            load(leaf, **given)
        assert leaf.name in e.value.message and source in e.value.message and str(value) in e.value.message
        assert e.value.exit_code == 2 and "\n" not in e.value.message


@pytest.mark.parametrize("leaf", ALL, ids=[f"{leaf.program}-{leaf.name}" for leaf in ALL])
def test_a_misspelt_name_is_refused_with_the_right_one(leaf: Leaf, load: Callable[..., Any]) -> None:
    wrong = leaf._replace(path=(*leaf.path[:-1], leaf.path[-1][:-1] + leaf.path[-1][-1] * 2))
    for given in (
        {"text": as_toml(wrong, 1)},
        {"environment": {wrong.variable: "1"}},
        {"assignments": [f"{wrong.name}=1"]},
    ):
        with pytest.raises(UsageError, match="no setting") as e:
            load(leaf, **given)
        assert f"did you mean {leaf.name}" in e.value.message


@pytest.mark.parametrize("leaf", ALL, ids=[f"{leaf.program}-{leaf.name}" for leaf in ALL])
def test_one_underscore_for_two_is_explained(leaf: Leaf, load: Callable[..., Any]) -> None:
    if len(leaf.path) > 1:
        single = leaf.variable.replace("__", "_")
        with pytest.raises(UsageError, match=f"{single}: .*{leaf.variable}"):
            load(leaf, environment={single: "1"})


def test_a_number_is_no_truth_value_and_no_nan(load: Callable[..., Any]) -> None:
    for leaf in ALL:
        if leaf.path[0] != "distil" and all(k in (int, float) for k in members(leaf.annotation)):
            for given in (
                {"text": f"{leaf.name} = true"},
                {"text": f"{leaf.name} = nan"},
                {"environment": {leaf.variable: "nan"}},
            ):
                with pytest.raises(UsageError, match=leaf.name):
                    load(leaf, **given)


def test_every_flag_of_run_sets_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "fps": "7",
        "max_frames": "3",
        "threads": "2",
        "oip_port": "1",
        "metrics_port": "1",
        "cloud": "h:1",
        "selector": "eata",
    }
    seen: dict[str, Any] = {}

    class Ended(Exception):  # noqa: N818
        pass

    def daemon(settings: Any, stop: Any) -> Any:
        seen["settings"] = settings
        raise Ended

    monkeypatch.setattr("edge.daemon.Daemon", daemon)
    options = {o.name: o for o in edge.cli.run.params}
    others = {"config", "once", "as_json", "assignments", "help"}
    assert set(edge.cli.FLAGS) == set(options) - others
    for flag, (path, meant) in edge.cli.FLAGS.items():
        text = texts.get(flag, "some where")
        words = [options[flag].opts[0]] + ([] if meant is not None else [text])
        CliRunner().invoke(edge.cli.edge, ["run", *words], env={})
        got = value_at(seen.pop("settings"), Leaf("edge", path, None))
        assert str(got) == str(meant if meant is not None else text) or float(got) == float(text)
    result = CliRunner().invoke(edge.cli.edge, ["run", "--fps", "-3"])
    assert isinstance(result.exception, UsageError) and "--fps: source.fps is -3.0" in result.exception.message


def test_one_variable_of_a_table_and_the_whole_table(load: Callable[..., Any]) -> None:
    leaf = next(leaf for leaf in ALL if leaf.name == "select.options")
    environment = {"REFOLD_EDGE_SELECT__OPTIONS__RATE": "0.5", "REFOLD_EDGE_SELECT__OPTIONS__BURST": "4"}
    assert load(leaf, "select.options = { peak = 0.25 }", environment).select.options == {"peak": 0.25, "rate": 0.5, "burst": 4}
    with pytest.raises(UsageError, match=r"REFOLD_EDGE_SELECT__OPTIONS__BURST.*whole number"):
        load(leaf, environment=environment | {"REFOLD_EDGE_SELECT__OPTIONS__BURST": "4.5"})
    bundle = Leaf("cloud", ("bundle",), None)
    settings = load(bundle, environment={"REFOLD_CLOUD_BUNDLE": '[{"path": "/m.refold", "teachers": [{"spec": "t.pt2"}]}]'})
    assert settings.bundle[0].path == Path("/m.refold") and settings.bundle[0].teachers[0].spec == "t.pt2"


def test_what_kubernetes_sets_for_a_service_of_our_name_is_told_and_passed_over(
    load: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    environment = {
        "REFOLD_CLOUD_SERVICE_HOST": "10.0.0.7",
        "REFOLD_CLOUD_SERVICE_PORT_GRPC": "7443",
        "REFOLD_CLOUD_PORT": "tcp://10.0.0.7:7443",
        "REFOLD_CLOUD_PORT_7443_TCP_ADDR": "10.0.0.7",
    }
    load(Leaf("cloud", (), None), environment=environment)
    assert all(name in caplog.text for name in environment)
    with pytest.raises(UsageError, match="REFOLD_CLOUD_HOME: there is no setting home"):
        load(Leaf("cloud", (), None), environment={"REFOLD_CLOUD_HOME": "/x"})


def test_an_assignment_without_a_value(load: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"write SECTION\.NAME=VALUE"):
        load(ALL[0], assignments=["source.fps"])


def test_another_distiller_judges_its_own_table(load: Callable[..., Any]) -> None:
    text = "[workers]\ndistiller = 'mine:make'\n[distil]\nanything = { goes = 1 }\n"
    assert load(Leaf("cloud", (), None), text).distil == {"anything": {"goes": 1}}


def test_the_service_checks_the_distillers_settings_without_torch(tmp_path: Path) -> None:
    (tmp_path / "cloud.toml").write_text("[distil]\nmix = 3\n")
    program = (
        "import sys; from pathlib import Path; from cloud.settings import load_settings\n"
        f"try: load_settings(Path({str(tmp_path / 'cloud.toml')!r}), {{}})\n"
        "except Exception as e: print(e)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "distil.mix is 3" in done.stdout


def test_a_process_takes_a_number_from_its_environment(tmp_path: Path) -> None:
    environment = {**os.environ, "REFOLD_EDGE_ADAPT__MIX": "0.2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "refold.cli", "edge", "run", "--data", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "No bundle to run" in done.stderr
    environment["REFOLD_EDGE_ADAPT__MIX"] = "1.2"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "refold: REFOLD_EDGE_ADAPT__MIX: adapt.mix is 1.2; it is a share between 0 and 1."
