"""The command line of `refold export`."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from export.bits import parse_bits
from export.calibrate import CHOICES
from export.capture import load_model
from export.diagnose.held_out import measured_accuracy
from export.diagnose.report import check_lines, warning_lines
from export.pictures import class_names, load_pictures
from export.pipeline import EVERY_TARGET, MOST_PICTURES, Exported, Options, export_model
from export.preprocessing import parse_preprocess
from export.targets import TARGETS
from refold.atomic import check_output
from refold.signing import SigningKey
from refold.sizes import parse_size

__all__ = ["export"]

SUBCOMMANDS = {
    "train": ("export.elastic.cli_train", "train"),
    "fixed-point": ("export.fixed_point.cli", "fixed_point_train"),
    "search": ("export.elastic.cli_search", "search"),
    "experts": ("export.experts.cli", "experts"),
}
FROM_RUN = ("export.elastic.cli_from", "export_from")
STEPS = 12  # about as many steps as the pipeline announces; the bar only has to move


@click.command(
    epilog="Elastic training: `refold export train`, `refold export search`, then `refold export --from RUN`; "
    "language models with experts: `refold export experts`; see their --help."
)
@click.argument("model")
@click.option("--weights", type=click.Path(path_type=Path), help="npz, safetensors or a torch state dict (never unpickled).")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of pictures, or npz with images uint8 (N, H, W, 3).",
)
@click.option(
    "--validation",
    type=click.Path(path_type=Path),
    help="Labelled images the model was not trained on, in the forms of --calibration: accuracy is measured on these.",
)
@click.option("--preprocess", required=True, help="As in 32x32,imagenet or a TOML/JSON file: docs/guide/export.md.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("ort-x86-avx2",),
    show_default=True,
    type=click.Choice([*TARGETS, EVERY_TARGET]),
    help="Repeat for several; all: every one that is possible, with the reasons for the others.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .refold file to write.")
@click.option("--name", help="Name of the model; default: the output's.")
@click.option("--classes", help="Class names: a,b,c or a file with one a line.")
@click.option("--input-size", metavar="WxH", help="Overrides the size in --preprocess.")
@click.option(
    "--sample-limit",
    type=click.IntRange(1, MOST_PICTURES),
    default=512,
    show_default=True,
    help="Calibration pictures to use and keep.",
)
@click.option(
    "--observer", type=click.Choice(CHOICES), default="auto", show_default=True, help="How activation ranges are chosen."
)
@click.option(
    "--bits",
    multiple=True,
    metavar="[LAYERS=]wNaM",
    help="Bits of weights and activations, 2 to 8: w4, w4a6, or layer3.*=w2 for some; first and last layer keep 8.",
)
@click.option("--budget", metavar="SIZE", help="Bytes for the integer weights, e.g. 60KB: bits by layer, by sensitivity.")
@click.option("--equalise", is_flag=True, help="Even out channel ranges across layers, where the output error falls.")
@click.option("--correct-bias", is_flag=True, help="Take the mean rounding error out of every channel, where that helps.")
@click.option("--keep-float", multiple=True, metavar="GLOB", help="Layers to leave in float; repeat for several.")
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Share of pictures on which int8 and float must choose the same class.",
)
@click.option(
    "--accept-difference",
    is_flag=True,
    help="Keep a target whose runtime chooses other classes than the bundle's other runtime; the bundle says how often.",
)
@click.option("--strict", is_flag=True, help="Warnings (chance accuracy, unlikely preprocessing, few images, ...) refuse.")
@click.option("--key", "keys", multiple=True, type=click.Path(path_type=Path), help="Sign with this private key (PEM).")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch, while exporting.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def export_one(
    model: str, weights: Path | None, calibration: Path, validation: Path | None, preprocess: str, targets: tuple[str, ...],
    output: Path,
    name: str | None, classes: str | None, input_size: str | None, sample_limit: int, observer: str, bits: tuple[str, ...],
    budget: str | None, equalise: bool, correct_bias: bool,
    keep_float: tuple[str, ...], min_agreement: float, accept_difference: bool, strict: bool, keys: tuple[Path, ...],
    threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Quantise MODEL (file.py:callable, package.module:callable or a .pt2) into a bundle.

    The norms stay updatable: a release of a few kilobytes changes them on a device without touching an integer.
    """
    torch.set_num_threads(threads)
    check_output(output)
    started = time.monotonic()
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=as_json) as bar:
        task = bar.add_task("reading the pictures", total=STEPS)

        def progress(what: str) -> None:
            bar.update(task, description=what, advance=1)
            if not console.is_terminal and not as_json:
                console.print(what, highlight=False)

        plan = parse_preprocess(preprocess, input_size)
        names = class_names(classes)
        signers = [SigningKey.load(k) for k in keys]
        pictures = load_pictures(calibration, plan, sample_limit, names)
        unseen = None
        if validation is not None:
            unseen = load_pictures(validation, plan, MOST_PICTURES, names, "validation")
        progress("loading the model")
        options = Options(
            targets, name or output.stem, names, observer, parse_bits(bits), None if budget is None else parse_size(budget),
            equalise, correct_bias, keep_float, min_agreement, accept_difference, strict,
        )  # fmt: skip
        loaded = load_model(model, weights)
        done = export_model(loaded, output, plan, pictures, options, keys=signers, progress=progress, validation=unseen)
    skipped = pictures.skipped + (() if unseen is None else unseen.skipped)
    _report(done, len(pictures.images), skipped, time.monotonic() - started, as_json)


def _report(done: Exported, used: int, skipped: tuple[str, ...], seconds: float, as_json: bool) -> None:
    layers, calibration = done.bundle.manifest.layers, done.recipe.calibration
    integer = sum(layer.runs_in == "int8" for layer in layers)
    if as_json:
        click.echo(json.dumps({
            "path": str(done.bundle.path), "digest": done.bundle.digest, "bytes": done.bundle.size, "pictures": used,
            "skipped": list(skipped), "observer": calibration.chosen, "observer_errors": dict(calibration.errors),
            "treated": {n: {"without": a, "with": b, "kept": b < a} for n, (a, b) in done.recipe.treated.items()},
            "bits": {layer.name: layer.weight_bits for layer in layers if layer.runs_in == "int8"},
            "sensitivities": {r.name: dict(r.errors) for r in done.recipe.sensitivities},
            "integer_layers": integer, "float_layers": len(layers) - integer, "seconds": round(seconds, 1),
            "checks": {t: dict(c) for t, c in done.checks.items()}, "refused": dict(done.refused),
            "shared_scales": [{"name": s.name, "op": s.op, "parts": dict(s.parts), "outputs": list(s.lost), "error": s.error,
                               "in_float": list(s.nodes)} for s in done.recipe.shared],
            "accuracy": {t: measured_accuracy(c, used) for t, c in done.checks.items()},
            "warnings": [f.told() for f in done.findings],
        }, indent=1))  # fmt: skip
        return
    if skipped:
        click.echo(
            f"{len(skipped)} pictures were skipped: {' '.join(skipped[:5])}{' ...' if len(skipped) > 5 else ''}", err=True
        )
    errors = ", ".join(f"{k} {v:.3f}" for k, v in calibration.errors.items())
    click.echo(f"{done.bundle.path}  {done.bundle.size:,} bytes  digest {done.bundle.digest[:16]}  {seconds:.0f} s")
    click.echo(f"{used} calibration pictures; output error by observer: {errors}; kept {calibration.chosen}")
    norms = done.bundle.norms.norms
    click.echo(
        f"{integer} integer layers of {_bits(done)} bits, {len(layers) - integer} float operators; "
        f"{len(norms)} updatable norms, {sum(s.channels for s in norms):,} channels"
    )
    for line in _choices(done):
        click.echo(line)
    for line in check_lines(done.checks, done.findings, used):
        click.echo(line)
    for target, why in done.refused.items():
        click.echo(f"{target}: left out. {why}")
    for line in warning_lines(done.findings):
        click.echo(line, err=True)


def _bits(done: Exported) -> str:
    """`7`, or `4 to 7` where layers differ."""
    found = {w.bits for w in done.recipe.model.weights.values()}
    return str(min(found)) if len(found) == 1 else f"{min(found)} to {max(found)}"


def _choices(done: Exported) -> Iterator[str]:
    """What was decided by measuring: values left in float, treatments, and the table of sensitivities behind a budget."""
    for shared in done.recipe.shared:
        yield f"{shared.name} ({shared.op}) stays in float: {shared.reason} (error {shared.error:.2f} of their spread)"
    for name, (without, having) in done.recipe.treated.items():
        verdict = "kept" if having < without else "left out"
        yield f"{name.replace('_', ' ')}: output error {without:.4f} without, {having:.4f} with; {verdict}"
    rows = done.recipe.sensitivities
    if not rows:
        return
    bits = {layer.name: layer.weight_bits for layer in done.bundle.manifest.layers}
    tried = sorted(rows[0].errors)
    width = max(len(r.name) for r in rows)
    yield f"{'error of the logits, this layer alone in':{width}}  {'bits':>4}  " + "  ".join(f"{b:>7}" for b in tried)
    for row in rows:
        yield f"{row.name:{width}}  {bits[row.name]:>4}  " + "  ".join(f"{row.errors[b]:7.4f}" for b in tried)
    total = sum(layer.weight_bytes for layer in done.bundle.manifest.layers if layer.runs_in == "int8")
    yield f"integer weights: {total:,} bytes"


def _named(where: tuple[str, str]) -> click.Command:
    found: click.Command = getattr(importlib.import_module(where[0]), where[1])
    return found


class _ExportGroup(click.Group):
    """`refold export MODEL ...` exports one model; the first word of a subcommand, or --from, leads elsewhere."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _named(SUBCOMMANDS[name]) if name in SUBCOMMANDS else None

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in SUBCOMMANDS:
            return super().make_context(info_name, args, parent, **extra)
        from_run = any(a == "--from" or a.startswith("--from=") for a in args)
        return (_named(FROM_RUN) if from_run else export_one).make_context(info_name, args, parent, **extra)


export = _ExportGroup("export", help="Quantise a PyTorch model into a bundle.")
