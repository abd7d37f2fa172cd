"""Files are the old or the new one, whatever happens in between."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from refold.atomic import write_atomically
from refold.errors import StorageError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_content_and_mode_arrive(tmp_path):
    write_atomically(tmp_path / "f", [b"a", b"b"], mode=0o600)
    assert (tmp_path / "f").read_bytes() == b"ab" and (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ValueError("source failed")

    with pytest.raises(ValueError, match="source failed"):
        write_atomically(tmp_path / "f", chunks())
    assert (tmp_path / "f").read_bytes() == b"old" and names(tmp_path) == ["f"]


def test_a_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomically(tmp_path / "none" / "f", [b""])


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A real write that fails half-way: the process may write only 4 KiB per file."""
    (tmp_path / "f").write_bytes(b"old")
    program = f"""
import resource, signal
from pathlib import Path
from refold.atomic import write_atomically
from refold.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomically(Path({str(tmp_path / "f")!r}), [bytes(3000)] * 5)
except StorageError as e:
    print(e.message)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_sigkill_at_any_moment_leaves_a_whole_file(tmp_path):
    program = f"""
from pathlib import Path
from refold.atomic import write_atomically
i = 0
print("go", flush=True)
while True:
    i += 1
    write_atomically(Path({str(tmp_path / "f")!r}), [bytes([i % 256]) * 50000] * 20)
"""
    for delay in (0.02, 0.05, 0.11, 0.17):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if (tmp_path / "f").exists():
            content = (tmp_path / "f").read_bytes()
            assert len(content) == 1_000_000 and len(set(content)) == 1
