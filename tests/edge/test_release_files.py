"""Stored releases: complete or absent, and checked when read."""

from __future__ import annotations

import pytest
from tiny_bundle import bundle, release

from edge.releases import ReleaseFiles
from refold import SigningKey
from refold.errors import ReleaseError, StorageError
from refold.release import seal


@pytest.fixture
def signed(tmp_path):
    return seal(release(bundle(tmp_path / "m.refold"), 1), SigningKey.generate())


def test_what_is_put_can_be_got(tmp_path, signed):
    files = ReleaseFiles(tmp_path / "r")
    name = files.put(signed)
    assert files.put(signed) == name and files.get(name) == signed and files.names() == [name]


def test_only_what_is_wanted_is_kept(tmp_path, signed):
    files = ReleaseFiles(tmp_path / "r")
    name = files.put(signed)
    (tmp_path / "r" / "f00.release").write_bytes(b"")
    (tmp_path / "r" / ".f00.release.1.tmp").write_bytes(b"half")
    (tmp_path / "r" / "notes.txt").write_text("somebody else's")
    files.keep_only([name, ""])
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [f"{name}.release", "notes.txt"]
    files.keep_only([])
    assert files.names() == []


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x0a\x03abc"])
def test_a_file_that_is_not_its_name_is_refused(tmp_path, signed, content):
    files = ReleaseFiles(tmp_path / "r")
    name = files.put(signed)
    (tmp_path / "r" / f"{name}.release").write_bytes(content)
    with pytest.raises(ReleaseError) as e:
        files.get(name)
    assert e.value.code == "damaged"
    with pytest.raises(ReleaseError):
        files.get("0" * 64)


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        ReleaseFiles(tmp_path / "file" / "r")


def test_what_cannot_be_removed_is_left(tmp_path, signed):
    files = ReleaseFiles(tmp_path / "r")
    files.put(signed)
    (tmp_path / "r" / "stuck.release").mkdir()
    files.keep_only([])
    assert (tmp_path / "r" / "stuck.release").is_dir()
