"""The demo's folder: emptied, locked, and never somebody else's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo import workplace as module
from demo.workplace import workplace
from refold.errors import StorageError, UsageError


def test_it_is_empty_twice_in_a_row(tmp_path: Path) -> None:
    for _ in range(2):
        with workplace(tmp_path / "run") as folder:
            assert [p.name for p in folder.iterdir()] == [".refold-demo"]
            (folder / "cloud").mkdir()
            (folder / "cloud" / "file").write_text("x")
            (folder / "link").symlink_to(tmp_path)
    assert tmp_path.is_dir()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with workplace(tmp_path / "run") as folder:
        (folder / "kept").write_text("x")
        with pytest.raises(UsageError, match="Another demo"), workplace(tmp_path / "run"):
            pass
        assert (folder / "kept").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not the demo's"), workplace(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").exists() and not (tmp_path / ".refold-demo").exists()


def test_no_room_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be used"), workplace(tmp_path / "file" / "run"):
        pass
    monkeypatch.setattr(module, "LEAST_FREE_BYTES", 2**62)
    with pytest.raises(StorageError, match="MiB free"), workplace(tmp_path / "run"):
        pass
