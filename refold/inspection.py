"""`refold inspect`, `extract` and `verify`: what a person asks of a bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from refold.bundle import Bundle, Progress, silent
from refold.errors import BundleError
from refold.experts import PagedModel
from refold.signing import KeyRing

__all__ = ["describe", "extract", "inspect", "verify"]

WATCHED = 1 << 28  # bytes that take a second or more
BAR, BAR_DB = 30, 60.0  # a full bar's characters and decibels


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything `refold inspect --json` prints: plain values only."""
    if bundle.paged:
        return _describe_paged(bundle)
    m = bundle.manifest
    return {
        **_identity(bundle),
        "preprocess": {
            "width": m.preprocess.width,
            "height": m.preprocess.height,
            "resize": bundle.preprocess.resize.name.lower(),
            "scale": m.preprocess.scale,
            "mean": list(m.preprocess.mean),
            "std": list(m.preprocess.std),
            "digest": bundle.preprocess.digest,
        },
        "classes": m.class_count,
        "targets": [
            {
                "name": t.name,
                "weight_bits": t.weight_bits,
                "updatable": t.updatable,
                "checks": dict(sorted(t.checks.items())),
                "accuracy_measured_on": _measured_on(t.checks),
            }
            for t in m.targets
        ],
        "warnings": [{"code": f.code, "message": f.message, "numbers": dict(sorted(f.numbers.items()))} for f in m.findings],
        "layers": [
            {
                "name": layer.name,
                "op": layer.op,
                "bits": layer.weight_bits,
                "bytes": layer.weight_bytes,
                "site": layer.site,
                "runs_in": layer.runs_in,
                "signal_to_noise_db": round(layer.signal_to_noise, 2) if layer.signal_to_noise else None,
            }
            for layer in m.layers
        ],
        "sites": [
            {"name": s.name, "kind": s.kind.name.lower(), "channels": s.channels, "norm": s.has_norm}
            for s in bundle.norms.sites
        ],
        "parts": _parts(bundle),
    }


def _measured_on(checks: Mapping[str, float]) -> str:
    """Which images the best accuracy among a target's checks stands for; "" where none was measured."""
    if "validation_accuracy_int8" in checks:
        return "validation"
    return "calibration" if "accuracy_int8" in checks else ""


def _identity(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "format": m.format,
        "name": m.name,
        "made_by": m.made_by,
        "bytes": bundle.size,
    }


def _parts(bundle: Bundle) -> list[dict[str, Any]]:
    return [{"path": p.path, "bytes": p.size, "sha256": p.sha256} for p in bundle.parts]


def _describe_paged(bundle: Bundle) -> dict[str, Any]:
    e = bundle.manifest.experts
    return {
        **_identity(bundle),
        "experts": {
            "family": e.family,
            "layers": e.layers,
            "experts": e.experts,
            "top_k": e.top_k,
            "record_bytes": e.record_bytes,
            "resident_bytes": e.resident_bytes,
            "bits": {str(b): n for b, n in sorted(e.bits.items())},
            "tokens": "bytes" if e.bytes_as_tokens else "tokenizer",
            "measured": dict(sorted(e.measured.items())),
        },
        "sites": [{"name": s.name, "kind": s.kind.name.lower(), "channels": s.channels} for s in bundle.norms.norms],
        "parts": _parts(bundle),
    }


def _print_paged(d: dict[str, Any]) -> None:
    e = d["experts"]
    click.echo(f"{d['name']}  {d['bytes']:,} bytes  digest {d['digest'][:16]}  by {d['made_by']}")
    click.echo(
        f"{e['family']}: {e['layers']} layers of {e['experts']} experts, {e['top_k']} a token; tokens: {e['tokens']}\n"
        f"experts {e['record_bytes']:,} bytes ({', '.join(f'{n} of {b} bits' for b, n in e['bits'].items())}); "
        f"always in memory {e['resident_bytes']:,} bytes"
    )
    channels = sum(s["channels"] for s in d["sites"])
    click.echo(f"{len(d['sites'])} norm sites, {channels:,} channels: a release is about {channels * 4:,} bytes")
    if e["measured"]:
        click.echo("\n" + _table([("measured at export", ""), *((k, f"{v:.6g}") for k, v in e["measured"].items())], {1}))
    click.echo("\n" + _table([("part", "bytes"), *((p["path"], f"{p['bytes']:,}") for p in d["parts"])], {1}))


def _table(rows: Sequence[tuple[str, ...]], right: set[int]) -> str:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Float against integers, layer by layer, as measured when it was exported.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def inspect(bundle: Path, compare: bool, as_json: bool) -> None:
    """Print what is inside BUNDLE: layers, bits, bytes, norm sites, targets, checks."""
    d = describe(Bundle.open(bundle))
    if as_json:
        click.echo(json.dumps(d, indent=1))
        return
    if "experts" in d:
        if compare:
            raise BundleError(f"{d['path']} is a language model: it was exported without the comparison.", code="no-comparison")
        _print_paged(d)
        return
    if compare:
        click.echo(_comparison(d))
        return
    pre = d["preprocess"]
    click.echo(f"{d['name']}  {d['bytes']:,} bytes  digest {d['digest'][:16]}  by {d['made_by']}")
    click.echo(
        f"input {pre['width']}x{pre['height']} RGB, resize {pre['resize']}, (pixel x {pre['scale']:.6g} - mean) / std, "
        f"mean {[round(v, 4) for v in pre['mean']]}, std {[round(v, 4) for v in pre['std']]}; {d['classes']} classes\n"
    )
    layers = [("layer", "operator", "bits", "bytes", "norm site", "runs in")]
    layers += [(r["name"], r["op"], str(r["bits"] or ""), f"{r['bytes']:,}", r["site"], r["runs_in"]) for r in d["layers"]]
    click.echo(_table(layers, {2, 3}))
    norms = [s for s in d["sites"] if s["norm"]]
    channels = sum(s["channels"] for s in norms)
    click.echo(f"\n{len(norms)} norm sites, {channels:,} channels: a release is about {channels * 16:,} bytes")
    for target in d["targets"]:
        click.echo(f"\ntarget {target['name']}: {target['weight_bits']}-bit weights, {_updatable(target)}")
        click.echo(_table([(f"  {k}", f"{v:.6g}") for k, v in target["checks"].items()] or [("  no checks", "")], {1}))
        if "accuracy_int8" in target["checks"]:
            click.echo("  accuracy_float, accuracy_int8: on the calibration images, which may be training images")
        if target["accuracy_measured_on"] == "validation":
            click.echo("  validation_*: on images given as unseen (--validation)")
    for warning in d["warnings"]:
        click.echo(f"\nwarning of the export: {warning['message']} [{warning['code']}]")
    click.echo("\n" + _table([("part", "bytes"), *((p["path"], f"{p['bytes']:,}") for p in d["parts"])], {1}))


def _updatable(target: dict[str, Any]) -> str:
    if target["updatable"]:
        return "updatable"
    return "updatable once its device has proved it" if "structure_checked" in target["checks"] else "FIXED"


def _comparison(d: dict[str, Any]) -> str:
    """Signal over quantisation noise at every layer's output, as a table with bars, and the layers where most is lost."""
    rows = [r for r in d["layers"] if r["signal_to_noise_db"] is not None]
    if not rows:
        raise BundleError(f"{d['path']} was exported without the comparison: export it again.", code="no-comparison")
    table = [("layer", "operator", "bits", "runs in", "dB", "signal over quantisation noise")]
    for r in rows:
        db = r["signal_to_noise_db"]
        bar = "█" * max(round(min(db, BAR_DB) / BAR_DB * BAR), 0)
        table.append((r["name"], r["op"], str(r["bits"] or ""), r["runs_in"].partition(":")[0], f"{db:.1f}", bar))
    steps = [(b["name"], b["signal_to_noise_db"] - a["signal_to_noise_db"]) for a, b in pairwise(rows)]
    lost = ", ".join(f"{name} ({step:.1f} dB)" for name, step in sorted(steps, key=lambda s: s[1])[:3])
    return _table(table, {2, 4}) + (f"\n\n6 dB are one bit. Most is lost at {lost}." if lost else "")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write to; default: the bundle's name.")
def extract(bundle: Path, output: Path | None) -> None:
    """Unpack BUNDLE into a directory; the models in it open in Netron."""
    opened = Bundle.open(bundle)
    with _bar(opened, "writing") as bar:
        root = opened.extract(output or bundle.with_suffix(""), bar)
    for part in opened.parts:
        click.echo(str(root / part.path))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", "keys", multiple=True, help="Trusted public key, 64 hex digits; the bundle must be signed by one.")
def verify(bundle: Path, keys: tuple[str, ...]) -> None:
    """Check every digest of BUNDLE and, with --key, its signature."""
    try:
        ring = KeyRing([bytes.fromhex(k) for k in keys]) if keys else None
    except ValueError:
        raise click.BadParameter("a key is 64 hex digits", param_hint="--key") from None
    opened = Bundle.open(bundle)
    paged = PagedModel.of(opened) if opened.paged else None
    with _bar(opened, "reading") as bar:
        (paged or opened).verify(ring, bar)
    records = f" and {len(paged.index.records)} expert records" if paged else ""
    click.echo(f"{bundle}: {len(opened.parts)} parts{records} match their digests{', signature good' if keys else ''}.")


@contextmanager
def _bar(bundle: Bundle, label: str) -> Iterator[Progress]:
    """Bytes done, on stderr where a person is watching; models of gigabytes take minutes."""
    total = sum(p.size for p in bundle.parts)
    if total < WATCHED or not sys.stderr.isatty():
        yield silent
        return
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update
