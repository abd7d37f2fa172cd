"""`refold cloud ...` as people run it: real subprocesses, SIGTERM, SIGKILL in the middle of uploads, and clear sentences."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec
from fleet_of import COHORT, Caller, key_pem, pictures, request_pem, sample, send_population, workers_of
from small_disk import SmallDisk

from cloud.cli import cloud
from cloud.provision import LOCAL, provision
from cloud.store import Store
from refold.bundle import Bundle
from refold.cli import main
from refold.errors import RefoldError, StorageError
from refold.v1 import admin_pb2, fleet_pb2


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def refold(*arguments: str, environment: dict[str, str] | None = None) -> Done:
    """The very command, in this process: its exit status and what it printed."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        try:
            main(list(arguments))
        except SystemExit as e:
            status = int(e.code or 0)
        finally:
            root.handlers = handlers
            root.setLevel(level)
    return Done(status, out.getvalue(), err.getvalue())


class Serving:
    """`refold cloud serve` as a subprocess; its ports are read from what it prints."""

    def __init__(self, config: Path, **environment: str) -> None:
        defaults = {
            "REFOLD_CLOUD_SERVER__PORT": "0",
            "REFOLD_CLOUD_SERVER__ENROL_PORT": "0",
            "REFOLD_CLOUD_WORKERS__MODE": "none",
        }
        command = [sys.executable, "-m", "refold.cli", "cloud", "serve", "--config", str(config), "--json", "--log-json"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **defaults, **environment}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.ready: dict[str, Any] = json.loads(line)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Sends a signal; returns the exit status and the log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, log

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def config(tmp_path: Path, small: Bundle) -> Iterator[Path]:
    """A fleet directory that knows the small bundle."""
    made = CliRunner().invoke(cloud, ["init", str(tmp_path / "fleet"), "--port", "0", "--enrol-port", "0"])
    assert made.exit_code == 0, made.output
    path = tmp_path / "fleet" / "cloud.toml"
    added = CliRunner().invoke(cloud, ["add-bundle", str(small.path), "--config", str(path)])
    assert added.exit_code == 0, added.output
    yield path


def join(config: Path, serving: Serving) -> Caller:
    ca = (config.parent / "ca.pem").read_bytes()
    token = CliRunner().invoke(cloud, ["token", "--cohort", COHORT, "--config", str(config)]).output.strip()
    key = ec.generate_private_key(ec.SECP256R1())
    stranger = Caller(f"localhost:{serving.ready['enrol_port']}", ca)
    answer = stranger.fleet.Enroll(fleet_pb2.EnrollRequest(join_token=token, csr_pem=request_pem(key)), timeout=20)
    stranger.close()
    caller = Caller(f"localhost:{serving.ready['port']}", ca, key_pem(key), answer.certificate_pem)
    caller.credentials = (ca, key_pem(key), answer.certificate_pem)  # type: ignore[attr-defined]
    return caller


def steering(config: Path, serving: Serving) -> Caller:
    folder = config.parent
    credentials = [(folder / name).read_bytes() for name in ("ca.pem", "operator.key", "operator.pem")]
    return Caller(f"localhost:{serving.ready['port']}", *credentials)


def wait_for(true: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_init_makes_private_keys_private_and_never_overwrites(tmp_path: Path) -> None:
    first = refold("cloud", "init", str(tmp_path / "fleet"), "--host", "cloud.example", "--json")
    assert first.returncode == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["hosts"] == ["cloud.example", *LOCAL] and len(told["release_key"]) == 64
    for name in ("ca.key", "server.key", "operator.key", "release.key"):
        assert (tmp_path / "fleet" / name).stat().st_mode & 0o777 == 0o600
    again = refold("cloud", "init", str(tmp_path / "fleet"))
    assert again.returncode == 2 and "already holds a fleet" in again.stderr and "Traceback" not in again.stderr


def test_sigterm_ends_the_service_gracefully_and_systemd_hears_of_it(config: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        with Serving(config, NOTIFY_SOCKET=str(tmp_path / "notify")) as serving:
            status, log = serving.end(signal.SIGTERM)
        assert [systemd.recv(64), systemd.recv(64)] == [b"READY=1", b"STOPPING=1"]
    assert status == 0, log
    assert json.loads(log.splitlines()[0])["message"] == "stopping"


def test_a_service_killed_in_the_middle_of_uploads_loses_nothing_it_acknowledged(config: Path, small: Bundle) -> None:
    samples = [sample(small, p) for p in pictures(240)]
    acknowledged: list[str] = []
    enough = threading.Event()
    with Serving(config) as serving:
        device = join(config, serving)

        def send() -> None:
            try:
                for i in range(0, len(samples), 4):
                    acknowledged.extend(device.upload(*samples[i : i + 4]).stored)
                    if len(acknowledged) >= 40:
                        enough.set()
            except grpc.RpcError:
                pass
            enough.set()

        sender = threading.Thread(target=send)
        sender.start()
        enough.wait(60)
        serving.end(signal.SIGKILL)
        sender.join(60)
        device.close()
    assert 40 <= len(acknowledged) < len(samples)
    with Serving(config) as serving:
        again = Caller(f"localhost:{serving.ready['port']}", *device.credentials)  # type: ignore[attr-defined]
        offer = again.offer(*samples)
        assert set(acknowledged) <= set(offer.unwanted) and len(offer.wanted) + len(offer.unwanted) == len(samples)
        wanted = set(offer.wanted)
        for i in range(0, len(samples), 60):
            part = [s for s in samples[i : i + 60] if s.header.digest in wanted]
            assert len(again.upload(*part).stored) == len(part)
        again.close()
        assert serving.end()[0] == 0
    store = Store(f"sqlite:///{config.parent / 'refold.db'}")
    rows = store.samples_after(small.digest, COHORT, 0, 999)
    assert sorted(r.digest for r in rows) == sorted(s.header.digest for s in samples)
    store.close()


def test_a_killed_service_takes_its_workers_along_and_releases_nothing_twice(config: Path, small: Bundle) -> None:
    environment = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "REFOLD_CLOUD_WORKERS__MODE": "process",
        "REFOLD_CLOUD_WORKERS__DISTILLER": "school_of_tests:make",
        "REFOLD_CLOUD_WORKERS__LOOK_S": "0.2",
        "REFOLD_CLOUD_WORKERS__INTERVAL_S": "0",
        "REFOLD_CLOUD_GATE__HELD_BACK": "8",
    }
    with Serving(config, **environment) as serving:
        device = join(config, serving)
        send_population(device, small)
        operator = steering(config, serving)
        wait_for(lambda: len(operator.admin.ListReleases(admin_pb2.ListReleasesRequest(), timeout=20).releases))
        workers = workers_of(serving.process.pid)
        serving.end(signal.SIGKILL)
        assert len(workers) == 1 and not psutil.wait_procs(workers, timeout=20)[1]
        device.close()
        operator.close()
    with Serving(config, **environment) as serving:
        operator = steering(config, serving)

        def idle() -> bool:
            cohorts = operator.admin.Status(admin_pb2.StatusRequest(), timeout=20).cohorts
            return all(c.distiller.startswith("waiting for evidence: d1: ") for c in cohorts)

        wait_for(idle)
        time.sleep(1.0)  # five looks: enough for a second decision, were there one
        assert len(operator.admin.ListReleases(admin_pb2.ListReleasesRequest(), timeout=20).releases) == 1
        operator.close()
        assert serving.end()[0] == 0


def test_the_devices_own_client_enrols_and_renews(config: Path, tmp_path: Path) -> None:
    from edge.enrol import Identity, enrol, renew
    from edge.link_settings import EnrolSettings, LinkSettings

    token = CliRunner().invoke(cloud, ["token", "--cohort", COHORT, "--config", str(config)]).output.strip()
    with Serving(config) as serving:
        (tmp_path / "device").mkdir()
        settings = EnrolSettings(address=f"localhost:{serving.ready['enrol_port']}", ca=config.parent / "ca.pem", name="Gate 7")
        identity = enrol(settings, token, tmp_path / "device")
        assert identity.device_id.startswith("gate-7-") and identity.cohort == COHORT
        assert [k.hex() for k in identity.release_keys] == [(config.parent / "release.pub").read_text().strip()]
        renewed = renew(identity, LinkSettings(address=f"localhost:{serving.ready['port']}"), tmp_path / "device")
        assert renewed.device_id == identity.device_id and renewed.certificate_pem != identity.certificate_pem
        assert Identity.load(tmp_path / "device").certificate_pem == renewed.certificate_pem


def test_status_releases_and_rollback_speak_to_people_and_machines(config: Path, small: Bundle) -> None:
    with Serving(config) as serving:
        join(config, serving).upload(*[sample(small, p) for p in pictures(2)])
        port = {"REFOLD_CLOUD_SERVER__PORT": str(serving.ready["port"])}
        where = ("--config", str(config))
        people = refold("cloud", "status", *where, environment=port)
        assert people.returncode == 0 and "small" in people.stdout and "gate-7-" in people.stdout, people.stderr
        machines = json.loads(refold("cloud", "status", *where, "--json", environment=port).stdout)
        assert machines["cohorts"][0]["samples"] == "2" and machines["cohorts"][0]["cohort"] == COHORT
        assert json.loads(refold("cloud", "releases", *where, "--json", environment=port).stdout) == {"releases": []}
        same = refold("cloud", "rollback", "0", *where, "--json", environment=port)
        assert json.loads(same.stdout)["current_version"] == 0
        wrong = refold("cloud", "rollback", "7", *where, "--json", environment=port)
        assert wrong.returncode == 6 and json.loads(wrong.stdout)["error"]["code"] == "no-release"
        nobody = refold("cloud", "rollback", "0", "--cohort", "cellar", *where, environment=port)
        assert nobody.returncode == 2 and f"--cohort {COHORT}" in nobody.stderr
        device = machines["devices"][0]["device_id"]
        assert refold("cloud", "revoke", device, *where).stdout == f"{device} is revoked.\n"
        assert refold("cloud", "revoke", "nobody", *where).returncode == 2
    gone = refold("cloud", "status", *where, environment=port)
    assert gone.returncode == 8 and "refold cloud serve" in gone.stderr


def failure(*arguments: str, **environment: str) -> tuple[int, str]:
    done = refold("cloud", *arguments, environment=environment)
    assert "Traceback" not in done.stderr and done.stderr.count("refold: ") == 1, done.stderr
    return done.returncode, done.stderr.split("refold: ")[1].strip()


def test_serve_says_what_is_wrong(config: Path, tmp_path: Path) -> None:
    where = ("serve", "--config", str(config))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, sentence = failure(*where, REFOLD_CLOUD_SERVER__PORT=str(port))
        assert status == 2 and f"127.0.0.1:{port}" in sentence and "server.port" in sentence
    status, sentence = failure("serve", "--config", str(tmp_path / "none.toml"))
    assert status == 2 and "refold cloud init" in sentence
    (config.parent / "server.pem").rename(config.parent / "kept.pem")
    assert failure(*where)[0] == 2
    (config.parent / "server.pem").write_bytes((config.parent / "operator.pem").read_bytes())
    assert "is not the key of" in failure(*where)[1]
    renewed = refold("cloud", "renew-server", "--config", str(config))
    assert renewed.returncode == 0
    with Serving(config) as serving:
        assert serving.end()[0] == 0
    (config.parent / "ca.key").write_text("nonsense")
    assert "not a certificate and its unencrypted key" in failure(*where)[1]


def test_two_services_on_one_port(config: Path) -> None:
    with Serving(config) as first:
        port = str(first.ready["port"])
        status, sentence = failure("serve", "--config", str(config), REFOLD_CLOUD_SERVER__PORT=port)
        assert status == 2 and "cannot be listened on" in sentence


def test_bundles_that_cannot_be_added(config: Path, tmp_path: Path, small: Bundle) -> None:
    where = ("--config", str(config))
    assert failure("add-bundle", str(tmp_path / "none.refold"), *where)[0] == 5
    (tmp_path / "cut.refold").write_bytes(small.path.read_bytes()[:-200])
    assert failure("add-bundle", str(tmp_path / "cut.refold"), *where)[0] == 5
    status, sentence = failure("add-bundle", str(small.path), "--teacher", "no/such.py:net", *where)
    assert status == 2 and "no/such.py" in sentence
    assert failure("add-bundle", str(small.path), "--teacher-weights", "w.npz", *where)[0] == 2


def test_token_and_gc(config: Path) -> None:
    runner = CliRunner()
    told = json.loads(runner.invoke(cloud, ["token", "--config", str(config), "--json", "--uses", "3"]).output)
    assert told["uses"] == 3 and len(told["token"]) == 32
    bad = runner.invoke(cloud, ["token", "--config", str(config), "--cohort", "a b"])
    assert isinstance(bad.exception, RefoldError)
    done = runner.invoke(cloud, ["gc", "--config", str(config), "--json"])
    assert json.loads(done.output) == {"samples": 0, "statistics": 0, "objects": 0}


def test_init_leaves_a_settings_file_that_names_every_setting(tmp_path: Path) -> None:
    from cloud.settings import CloudSettings, load_settings

    text = provision(tmp_path / "fleet", LOCAL, 1, 2, "0.0.0.0").read_text()
    for section, model in CloudSettings().model_dump(exclude={"distil", "bundle"}).items():
        assert f"[{section}]" in text
        for key in model:
            assert f"\n{key} = " in text or f"\n# {key} = " in text, key
    (tmp_path / "fleet" / "all.toml").write_text("\n".join(_uncommented(text)))
    everything, brief = load_settings(tmp_path / "fleet" / "all.toml", {}), load_settings(tmp_path / "fleet" / "cloud.toml", {})
    assert everything == brief


def _uncommented(text: str) -> list[str]:
    lines = [line.removeprefix("# ") for line in text.splitlines() if not line.startswith("# ") or " = " in line]
    return [line for line in lines if not line.startswith(("path", "teachers", "#"))]


def test_init_on_a_disk_that_fills_up_leaves_nothing_in_the_way_of_the_next(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk") as disk:
        disk.fill()
        os.truncate(disk.root / "ballast", (disk.root / "ballast").stat().st_size - 4 * 4096)  # for some of its files
        with pytest.raises(StorageError, match="No space left"):
            provision(disk.root / "fleet", ["localhost"], 7443, 7444, "")
        assert not list((disk.root / "fleet").iterdir())
        disk.free()
        assert provision(disk.root / "fleet", ["localhost"], 7443, 7444, "").is_file()
