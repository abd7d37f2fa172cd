"""Where a result cannot be written, that is said first, in one sentence, and by its first reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from samples import manifest
from small_disk import SmallDisk

from refold import write_bundle
from refold.atomic import check_output, discard, write_atomically, write_new
from refold.cli import main
from refold.errors import StorageError, UsageError
from refold.signing import SigningKey


@pytest.fixture
def disk(tmp_path):
    with SmallDisk(tmp_path / "disk") as disk:
        yield disk


def test_on_a_read_only_disk_the_first_error_is_the_one_that_is_said(disk):
    disk.read_only(True)
    for write in (
        lambda: write_atomically(disk.root / "f", [b"x"]),
        lambda: write_bundle(disk.root / "m.refold", manifest(), {"a": b"x"}),
        lambda: write_new(disk.root / "key", b"x"),
        lambda: SigningKey.generate().save(disk.root / "key"),
        lambda: check_output(disk.root / "m.refold"),
    ):
        with pytest.raises(StorageError, match="cannot be written: Read-only file system"):
            write()


def test_a_full_disk_is_found_before_the_work(disk):
    check_output(disk.root / "m.refold")
    disk.fill()
    with pytest.raises(StorageError, match="No space left"):
        check_output(disk.root / "m.refold")
    with pytest.raises(StorageError, match="No space left"):
        SigningKey.generate().save(disk.root / "key")
    assert [p.name for p in disk.root.iterdir()] == ["ballast"]  # half a key would stand in the way of the next one
    disk.free()
    SigningKey.generate().save(disk.root / "key")
    with pytest.raises(UsageError, match="never overwritten"):
        SigningKey.generate().save(disk.root / "key")


def test_paths_that_no_disk_will_mend(tmp_path):
    with pytest.raises(UsageError, match="is a directory"):
        check_output(tmp_path)
    with pytest.raises(UsageError, match="There is no directory"):
        check_output(tmp_path / "none" / "m.refold")
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UsageError, match="device or a pipe"):
            check_output(special)
    (tmp_path / "pipe").unlink()
    (tmp_path / "m.refold").write_bytes(b"the earlier one")
    check_output(tmp_path / "m.refold")
    discard(tmp_path / "none" / "x")
    discard(tmp_path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"the earlier one"]


def test_extract_says_where_it_cannot_write(tmp_path, capsys):
    write_bundle(tmp_path / "m.refold", manifest(), {"a": b"x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        main(["extract", str(tmp_path / "m.refold"), "-o", str(tmp_path / "file")])
    said = capsys.readouterr().err
    assert end.value.code == 7 and said.startswith("refold: ") and "file" in said and said.count("\n") == 1


def test_an_error_of_the_disk_that_nobody_foresaw_is_a_sentence(tmp_path, monkeypatch, capsys):
    def surprise(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("refold.inspection.Bundle.open", surprise)
    monkeypatch.delenv("REFOLD_DEBUG", raising=False)
    with pytest.raises(SystemExit) as end:
        main(["verify", "x.refold"])
    said = capsys.readouterr().err
    assert end.value.code == 7 and said == "refold: x.refold: Input/output error. Check the path and the disk.\n"
