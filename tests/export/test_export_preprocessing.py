"""The grammar of --preprocess."""

from __future__ import annotations

import json

import pytest

from export.preprocessing import parse_preprocess
from refold.errors import UsageError
from refold.preprocess import Resize


def test_short_forms():
    p = parse_preprocess("32x24,imagenet")
    assert (p.width, p.height, p.mean[0], p.std[2]) == (32, 24, 0.485, 0.225) and p.resize is Resize.EXACT
    assert parse_preprocess("32,scale=1").scale == 1.0
    assert parse_preprocess("96, pixels").mean == (0.0, 0.0, 0.0)
    p = parse_preprocess("96x96,scale=1/255,mean=0.5/0.4/0.3,std=0.5")
    assert p.mean == (0.5, 0.4, 0.3) and p.std == (0.5, 0.5, 0.5) and p.scale == 1 / 255
    assert parse_preprocess("symmetric", "64x48").width == 64
    p = parse_preprocess("224,imagenet,resize=crop")
    assert p.resize is Resize.CENTRE_CROP and p.resize_short == 256
    assert parse_preprocess("224,resize=stretch").resize is Resize.STRETCH


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_files(suffix, tmp_path):
    values = {"width": 48, "height": 32, "set": "imagenet", "std": [0.2, 0.3, 0.4]}
    text = json.dumps(values) if suffix == "json" else "\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items())
    path = tmp_path / f"p.{suffix}"
    path.write_text(text)
    p = parse_preprocess(str(path))
    assert (p.width, p.height, p.mean[0], p.std) == (48, 32, 0.485, (0.2, 0.3, 0.4))
    path.write_text("[")
    with pytest.raises(UsageError, match="not valid"):
        parse_preprocess(str(path))
    path.write_text("[]" if suffix == "json" else "depth = 3")
    with pytest.raises(UsageError):
        parse_preprocess(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("imagenet", "names no size"),
        ("32x32,imagnet", "neither a size"),
        ("32x32,set=foo", "no set 'foo'"),
        ("32x32,colour=bgr", "not known"),
        ("32x32,mean=1/2", "2 numbers"),
        ("32x32,scale=abc", "not a number"),
        ("32x32,scale=1/0", "not a number"),
        ("32x32,scale=inf", "not finite"),
        ("32x32,std=0", "above 0"),
        ("32x32,resize=fit", "one of exact"),
        ("224,resize=crop,short=100", "smaller than the crop"),
        ("0x32", "from 1 to 8192"),
        ("missing.toml", "cannot be read"),
    ],
)
def test_refusals(text, says):
    with pytest.raises(UsageError, match=says):
        parse_preprocess(text)
