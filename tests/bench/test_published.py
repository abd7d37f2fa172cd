"""The published page says what the JSON says, to the last digit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.published import BLOCK, PAGE, RESULTS, TABLES, filled, formatted
from refold.errors import InputError


def test_the_page_is_what_the_results_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run python -m bench.published"


def test_every_published_result_is_shown() -> None:
    shown = {m["name"] for m in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}
    assert shown == set(TABLES) and shown <= {p.stem for p in RESULTS.glob("*.json")}


def test_claims_are_shown_whether_or_not_they_hold() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in TABLES:
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        block = next(m["content"] for m in BLOCK.finditer(page) if m["name"] == name)
        assert block.count("**does not hold**") == sum(not c["holds"] for c in result["claims"])
        assert result["commit"] in block


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    block = next(m for m in BLOCK.finditer(page) if m["name"] == "overhead")
    number = re.search(r"\d\.\d+", block["content"][block["content"].index("| net") :])
    assert number is not None
    at = block.start("content") + block["content"].index("| net") + number.start()
    changed = page[:at] + ("9" if page[at] != "9" else "8") + page[at + 1 :]
    assert filled(changed) == page != changed
    with pytest.raises(InputError, match="no published result"):
        filled(page, tmp_path)


def test_cells() -> None:
    assert [formatted(v) for v in (None, True, 12345, 0.123456, 98765.4, float("nan"), "a|b")] == [
        "", "yes", "12,345", "0.1235", "98,765", "not measured", "a\\|b",
    ]  # fmt: skip
