"""What is synced into a new directory is lost with it unless the directory's own entry is synced too: fsync(2), NOTES."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from refold.atomic import make_directory, write_atomically, write_new
from refold.errors import StorageError, UsageError


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every directory that is synced, in order, as it was called then."""
    found: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            found.append(path)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def _objects(folder: Path) -> None:
    from cloud.store import DirectoryObjects

    DirectoryObjects(folder / "objects").put(b"one")


def _provision(folder: Path) -> None:
    from cloud.provision import provision

    provision(folder / "fleet", ["localhost"], 0, 0, "127.0.0.1")


def _release(folder: Path) -> None:
    from edge.releases import ReleaseFiles
    from refold.v1 import norms_pb2

    ReleaseFiles(folder / "updates" / "bundle").put(norms_pb2.SignedRelease(payload=b"p"))


def _identity(folder: Path) -> None:
    from edge.enrol import _write

    _write(folder / "identity", "identity.json", {})


def _outbox(folder: Path) -> None:
    from edge.outbox import Outbox

    Outbox(folder / "outbox.sqlite").close()


def _data(folder: Path) -> None:
    from edge.directory import DataDirectory

    data = DataDirectory(folder / "data")
    data.lock()
    write_atomically(data.bank("b" * 64), [b"bank"])
    data.unlock()


def _paths(folder: Path) -> None:
    from refold.atomic import write_atomically as write

    make_directory(folder / "paths")
    write(folder / "paths" / "table.npz", [b""])


WRITERS: dict[str, Callable[[Path], None]] = {
    "objects": _objects, "provision": _provision, "release": _release, "identity": _identity, "outbox": _outbox, "data": _data,
    "make_directory": _paths,
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_every_new_directory_is_entered_durably_into_the_one_above(writer: str, tmp_path: Path, synced: list[Path]) -> None:
    WRITERS[writer](tmp_path / "new" / "newer")
    made = [d for d in tmp_path.rglob("*") if d.is_dir()]
    assert len(made) > 1 and {d.parent for d in made} <= set(synced)


def test_objects_sync_a_folder_that_another_process_has_just_made(tmp_path: Path, synced: list[Path]) -> None:
    from cloud.store import DirectoryObjects

    objects = DirectoryObjects(tmp_path)
    objects.path(DirectoryObjects(tmp_path / "elsewhere").put(b"one")).parent.mkdir()  # and was not synced by anybody yet
    synced.clear()
    objects.put(b"one")
    assert tmp_path in synced
    synced.clear()
    objects.put(b"one")
    assert tmp_path not in synced  # once is enough


def test_a_directory_that_is_there_costs_nothing(tmp_path: Path, synced: list[Path]) -> None:
    make_directory(tmp_path)
    assert not synced
    make_directory(tmp_path / "a" / "b", mode=0o700)
    assert synced == [tmp_path / "a", tmp_path] and (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_a_relative_directory(tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_directory(Path("a/b"))
    assert synced == [tmp_path / "a", tmp_path]


def test_a_file_in_the_way_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            make_directory(path)


def test_new_files_are_whole_and_never_overwritten(tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from cloud.identity import write_private
    from refold.signing import SigningKey

    write_new(tmp_path / "f", b"content", mode=0o600)
    assert (tmp_path / "f").read_bytes() == b"content" and (tmp_path / "f").stat().st_mode & 0o777 == 0o600
    assert synced == [tmp_path]
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "f", b"other")
    for save in (SigningKey.generate().save, lambda path: write_private(path, b"key")):
        with pytest.raises(UsageError, match="never overwritten"):
            save(tmp_path / "f")
    with pytest.raises(StorageError):
        write_new(tmp_path / "none" / "f", b"")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_new(tmp_path / "g", b"content")
    assert (tmp_path / "f").read_bytes() == b"content" and not (tmp_path / "g").exists()
