"""The end of a file that is appended to is mended at opening: no line is glued to another, and none is lost that was whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_disk import SmallDisk

from refold.append import append_line, open_append
from refold.errors import StorageError

WHOLE = b'{"frame":0}\n{"frame":1}\n'


@pytest.mark.parametrize(
    ("end", "mended"),
    [
        (b"", b""),
        (b'{"frame":2,"sou', b""),
        (b'{"frame":2}', b'{"frame":2}\n'),
        (b"\0" * 300, b""),
        (b'\0\0{"fr', b""),
        (b'{"source":"caf\xc3', b""),
        (b"somebody's note", b"somebody's note\n"),
        (b"[1, 2", b""),
    ],
)
@pytest.mark.parametrize("before", [b"", WHOLE])
def test_a_torn_end_is_mended(tmp_path, before, end, mended):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(before + end)
    append_line(path, b'{"frame":3}')
    assert path.read_bytes() == before + mended + b'{"frame":3}\n'


def test_text_loses_nothing(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"[2026-01-01] start\n{half a")
    with open_append(path, json_lines=False) as f:
        f.write(b"next\n")
    assert path.read_text().splitlines() == ["[2026-01-01] start", "{half a", "next"]


@given(
    lines=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3), max_size=5),
    data=st.data(),
)
def test_cut_anywhere_every_whole_line_before_and_after_is_there(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("a") / "lines.jsonl"
    written = "".join(json.dumps(line) + "\n" for line in lines).encode()
    cut = data.draw(st.integers(0, len(written)))
    path.write_bytes(written[:cut])
    append_line(path, b'{"after":1}')
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    whole = written[:cut].count(b"\n") + (written[cut : cut + 1] == b"\n")
    assert found == [*lines[:whole], {"after": 1}]


def test_a_line_longer_than_what_is_looked_at_is_ended_and_not_cut(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"{" * (2**20 + 5))
    append_line(path, b"{}")
    assert path.stat().st_size == 2**20 + 5 + 4 and path.read_bytes().endswith(b"{\n{}\n")


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    with open_append(path) as first:
        first.write(b'{"frame":2,')
        with open_append(path) as second:
            second.write(b"")
        first.write(b'"x":1}\n')
    assert path.read_bytes() == b'{"frame":2,"x":1}\n'


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="cannot be written"):
        append_line(tmp_path / "pipe", b"{}")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    append_line(tmp_path / "pipe", b"{}")
    assert os.read(reader, 10) == b"{}\n"
    os.close(reader)


def test_a_disk_that_fills_up_in_the_middle_of_a_line(tmp_path):
    with SmallDisk(tmp_path / "disk") as disk:
        path = disk.root / "lines.jsonl"
        line = json.dumps({"x": "y" * 3000}).encode()
        append_line(path, line)
        disk.fill()
        with pytest.raises(StorageError, match="No space left"):
            for _ in range(10):
                append_line(path, line)
        assert not path.read_bytes().endswith(b"\n")
        with pytest.raises(StorageError):
            append_line(path, line)
        disk.free()
        append_line(path, b'{"after":1}')
        assert [json.loads(x) for x in path.read_bytes().splitlines()][-1] == {"after": 1}


def test_killed_again_and_again_every_line_stays_a_line(tmp_path):
    """Large lines in several writes, as on a disk that is almost full: SIGKILL finds halves."""
    path = tmp_path / "lines.jsonl"
    program = f"""
import json, pathlib
from refold.append import open_append
n = 0
with open_append(pathlib.Path({str(path)!r})) as f:
    while True:
        line = json.dumps({{"n": n, "fill": "x" * 5000}}).encode() + b"\\n"
        for i in range(0, len(line), 100):
            f.write(line[i : i + 100])
        n += 1
"""
    torn = 0
    for _ in range(4):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", program])
        while not path.exists() or path.stat().st_size < before + 50_000:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        torn += not path.read_bytes().endswith(b"\n")
    append_line(path, b'{"n":-1}')
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert (
        torn
        and len(rows) > 20
        and sum(row["n"] == 0 for row in rows) == 4
        and all(len(r.get("fill", "")) in (0, 5000) for r in rows)
    )


def test_every_file_that_is_appended_to_is_opened_here():
    """A file opened for appending elsewhere would glue a line to the torn one before it."""
    root = Path(__file__).parents[2]
    folders = ("refold", "edge", "cloud", "export", "bench", "demo")
    pattern = re.compile(r"""open\([^)\n]*["']a[bt+]*["']|O_APPEND|FileHandler\(""")
    found = [p for f in folders for p in (root / f).rglob("*.py") if pattern.search(p.read_text())]
    assert found == [root / "refold" / "append.py"]
