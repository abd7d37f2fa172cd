"""What --preprocess may say: a file (TOML or JSON) or a short text.

    32x32,imagenet                                   width x height, then a named set
    224,imagenet,resize=crop,short=256               one number: a square
    32x32,scale=1                                    pixels as they are, 0..255
    96x96,scale=1/255,mean=0.5/0.5/0.5,std=0.5       value = (pixel * scale - mean) / std; one number stands for all three

Named sets: imagenet (mean .485/.456/.406, std .229/.224/.225), unit (0..1), symmetric (-1..1), pixels (0..255).
resize: exact (other sizes are refused), stretch, crop (short side to `short`, then the centre).
A file has the keys width, height, set, scale, mean, std, resize, short.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from refold.errors import UsageError
from refold.preprocess import Preprocess, Resize

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["SETS", "parse_preprocess"]

SETS: dict[str, dict[str, Any]] = {
    "imagenet": {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "unit": {"scale": 1 / 255},
    "symmetric": {"scale": 1 / 255, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    "pixels": {"scale": 1.0},
}
RESIZES = {"exact": Resize.EXACT, "stretch": Resize.STRETCH, "crop": Resize.CENTRE_CROP}
KEYS = ("width", "height", "set", "scale", "mean", "std", "resize", "short")


def parse_preprocess(text: str, size: str | None = None) -> Preprocess:
    """Args:
        text: a file's path, or the short form above.
        size: `WxH` or one number; overrides the size in `text`.

    Raises:
        UsageError: what is wrong with it, and what may be said.
    """  # fmt: skip
    path = Path(text)
    values = _from_file(path) if path.suffix in (".toml", ".json") else _from_text(text)
    if size is not None:
        values.update(_size(size))
    unknown = set(values) - set(KEYS)
    if unknown:
        raise UsageError(f"--preprocess: {sorted(unknown)[0]!r} is not known; there are {', '.join(KEYS)}.")
    if "width" not in values or "height" not in values:
        raise UsageError("--preprocess names no size: begin with one, as in 32x32,imagenet, or give --input-size.")
    name = values.get("set", "unit")
    if name not in SETS:
        raise UsageError(f"--preprocess: there is no set {name!r}; there are {', '.join(SETS)}.")
    merged = {**SETS[name], **{k: v for k, v in values.items() if k != "set"}}
    resize = RESIZES.get(str(merged.get("resize", "exact")))
    if resize is None:
        raise UsageError(f"--preprocess: resize is one of {', '.join(RESIZES)}, not {merged['resize']!r}.")
    width, height = (_whole(merged[k], k) for k in ("width", "height"))
    short = _whole(merged["short"], "short") if "short" in merged else round(min(width, height) * 256 / 224)
    if resize is Resize.CENTRE_CROP and short < max(width, height):
        raise UsageError(f"--preprocess: short={short} is smaller than the crop of {width}x{height}.")
    return Preprocess(
        width=width,
        height=height,
        scale=_number(merged.get("scale", 1 / 255), "scale"),
        mean=_three(merged.get("mean", 0.0), "mean"),
        std=_three(merged.get("std", 1.0), "std"),
        resize=resize,
        resize_short=short if resize is Resize.CENTRE_CROP else 0,
    )


def _from_file(path: Path) -> dict[str, Any]:
    try:
        content = path.read_text(encoding="utf-8")
        values = tomllib.loads(content) if path.suffix == ".toml" else json.loads(content)
    except OSError as e:
        raise UsageError(f"--preprocess: {path} cannot be read: {e.strerror or e}.") from e
    except ValueError as e:
        raise UsageError(f"--preprocess: {path} is not valid {path.suffix[1:].upper()}: {e}.") from e
    if not isinstance(values, dict):
        raise UsageError(f"--preprocess: {path} must hold a table of settings.")
    return values


def _from_text(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if equals:
            values[key.strip()] = value.strip()
        elif part in SETS:
            values["set"] = part
        else:
            values.update(_size(part))
    return values


def _size(text: str) -> dict[str, Any]:
    width, _, height = text.lower().partition("x")
    if not width.isdigit() or not (height or width).isdigit():
        raise UsageError(
            f"--preprocess: {text!r} is neither a size (32x32, 224) nor a set ({', '.join(SETS)}) nor key=value.",
        )
    return {"width": int(width), "height": int(height or width)}


def _number(value: Any, key: str) -> float:
    try:
        above, slash, below = str(value).partition("/")
        number = float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"--preprocess: {key}={value} is not a number.") from None
    if not math.isfinite(number):
        raise UsageError(f"--preprocess: {key}={value} is not finite.")
    return number


def _whole(value: Any, key: str) -> int:
    number = _number(value, key)
    if number != int(number) or not 0 < number <= 8192:
        raise UsageError(f"--preprocess: {key}={value} is not a number of pixels from 1 to 8192.")
    return int(number)


def _three(value: Any, key: str) -> tuple[float, float, float]:
    parts = list(value) if isinstance(value, (list, tuple)) else str(value).split("/")
    numbers = [_number(p, key) for p in parts]
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise UsageError(f"--preprocess: {key}={value} has {len(numbers)} numbers; give one, or three (red/green/blue).")
    return (numbers[0], numbers[1], numbers[2])
