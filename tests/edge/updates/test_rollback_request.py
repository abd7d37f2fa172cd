"""A rollback asked for on the device: obeyed once, kept until it is durable, whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machine_world import World, _domains, _ordered, make_bundle

from edge.updates.request import RollbackRequests, ask
from edge.updates.table import DURABLE, TABLE, Event
from refold.errors import StorageError

PROCESS = Path(__file__).with_name("request_process.py")


@pytest.fixture
def world(tmp_path):
    (tmp_path / "device").mkdir()
    device = World(tmp_path / "device", make_bundle(tmp_path)).boot()
    _domains(device)
    _ordered((1, ""), (2, ""), (3, "d1"))(device)
    yield device
    device.updater.close()


def request_of(world: World) -> Path:
    return world.folder / "rollback.request"


def test_each_request_takes_back_one_release(world):
    for left in ([1, 2], [1], []):
        ask(request_of(world), "by hand")
        world.requests.look()
        world.requests.look()
        assert world.versions == left and not request_of(world).exists()
        world.agree()
    ask(request_of(world), "once more")  # nothing is left to go back from
    world.requests.look()
    assert not request_of(world).exists()
    assert [why for _, what, _, why in world.updater.journal() if what == "refused"] == ["by hand"] * 3


def test_a_file_written_by_hand_is_a_request_too(world):
    request_of(world).write_text("accuracy fell\n")
    world.requests.look()
    assert world.versions == [1, 2] and "accuracy fell" in str(world.updater.journal())


def test_one_that_cannot_be_made_durable_waits(world, monkeypatch):
    ask(request_of(world), "by hand")

    def full(_change):
        raise StorageError("The disk is full.")

    world.updater._do["committed"] = full
    for _ in range(2):
        with pytest.raises(StorageError, match="full"):
            world.requests.look()
        assert request_of(world).exists() and world.versions == [1, 2, 3]
        world.agree()
    world.updater._do = world.updater._steps()
    world.requests.look()
    assert world.versions == [1, 2] and not request_of(world).exists()


def test_a_file_that_cannot_be_removed_counts_once(world, monkeypatch):
    ask(request_of(world), "by hand")

    def stuck(self, missing_ok=False):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", stuck)
    for _ in range(3):
        with pytest.raises(StorageError, match="cannot be removed"):
            world.requests.look()
        assert world.versions == [1, 2]
    monkeypatch.undo()
    world.updater.close()
    world.boot().requests.look()
    assert world.versions == [1, 2] and not request_of(world).exists()


def test_it_waits_for_an_updater_that_may_come_and_not_for_one_that_will_not(tmp_path):
    path = tmp_path / "rollback.request"
    ask(path, "by hand")
    waiting = [True]
    requests = RollbackRequests(path, lambda: None, lambda: waiting[0])
    requests.look()
    assert path.exists()
    waiting[0] = False
    requests.look()
    assert not path.exists()


@pytest.mark.parametrize("step", [row.step for row in TABLE[Event.REVERT]])
def test_a_daemon_killed_while_it_obeys_has_obeyed_once_or_will(world, step):
    """A real process, a real SIGKILL; the request's file is still there afterwards."""
    world.close()
    ask(request_of(world), "by hand")
    (world.folder / "keys").write_bytes(b"".join(k.public_bytes_raw() for k in world.ring._keys.values()))
    command = [sys.executable, str(PROCESS), str(world.folder), str(world.bundle.path), step]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert request_of(world).exists()
    world.boot()
    assert world.versions == ([1, 2] if step in DURABLE else [1, 2, 3])
    for _ in range(2):
        world.requests.look()
        assert world.versions == [1, 2] and not request_of(world).exists()
    world.agree()
