"""Following a file of JSON lines that grows in arbitrary pieces."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from demo.follow import Follower


@given(st.lists(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=3), max_size=8), st.data())
def test_every_line_arrives_once_however_the_writes_are_cut(values: list[dict], data: st.DataObject) -> None:
    content = b"".join(json.dumps(v).encode() + b"\n" for v in values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        follower = Follower(path)
        assert follower.read() == []
        found = []
        for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            with path.open("ab") as f:
                f.write(content[start:end])
            found += follower.read()
    assert found == values and follower.damaged == 0


def test_damaged_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\nnonsense\n[1]\n\n\xff\xfe\n{"b": 2}\n{"half')
    follower = Follower(path)
    assert follower.read() == [{"a": 1}, {"b": 2}] and follower.damaged == 3
