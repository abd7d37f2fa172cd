"""A real file system of a few megabytes that a test can fill, freeze or make read-only. Needs root; tests skip without."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest


def _command(*words: object) -> str:
    """Empty, or why it failed."""
    try:
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False, timeout=30)
    except OSError as e:
        return str(e)
    return (done.stderr or f"exit {done.returncode}").strip() if done.returncode else ""


class SmallDisk:
    """Mounted at `root` while the `with` block lasts. kind: "tmpfs", or "ext4" in a file, which alone can be frozen."""

    def __init__(self, root: Path, kind: str = "tmpfs", options: str = "size=2m") -> None:
        self.root, self._kind, self._options = root, kind, options

    def __enter__(self) -> SmallDisk:
        self.root.mkdir(exist_ok=True)
        if self._kind == "tmpfs":
            why = _command("mount", "-t", "tmpfs", "-o", self._options, "tmpfs", self.root)
        else:
            image = self.root.with_suffix(".img")
            image.write_bytes(b"")
            with image.open("r+b") as f:
                f.truncate(16 * 2**20)
            why = _command("mkfs.ext4", "-q", image) or _command("mount", "-o", "loop", image, self.root)
        if why:
            pytest.skip(f"no {self._kind} can be mounted here: {why}")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._kind == "ext4":
            _command("fsfreeze", "-u", self.root)
        _command("umount", "-l", self.root)

    @property
    def _ballast(self) -> Path:
        return self.root / "ballast"

    def fill(self) -> None:
        """To the last block."""
        with suppress(OSError), self._ballast.open("ab", buffering=0) as f:
            while f.write(b"x" * 4096) == 4096:
                pass

    def use_all_inodes(self) -> None:
        with suppress(OSError):
            for i in range(10**6):
                (self.root / f"ballast-{i}").touch()

    def free(self) -> None:
        for path in self.root.glob("ballast*"):
            path.unlink()

    def read_only(self, on: bool) -> None:
        why = _command("mount", "-o", f"remount,{'ro' if on else 'rw'}", self.root)
        assert not why, why

    def freeze(self) -> None:
        why = _command("fsfreeze", "-f", self.root)
        if why:
            pytest.skip(f"no file system can be frozen here: {why}")

    def thaw(self) -> None:
        _command("fsfreeze", "-u", self.root)
