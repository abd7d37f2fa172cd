"""Sizes as people write them."""

from __future__ import annotations

import pytest

from refold.errors import UsageError
from refold.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("60KB", 60_000), ("1.5 mb", 1_500_000), ("512MiB", 512 * 2**20), (" 2 GB ", 2 * 10**9)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KB", "-1", "1e3", "5 apples", "1.2.3MB"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="no size"):
        parse_size(text)
