"""`refold export fixed-point`: trains in adaptive fixed-point words, goes on after a kill, and tells what came of it."""

from __future__ import annotations

import io
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn
from torch import nn
from torch.export import ExportedProgram

from export.bits import glob_of
from export.capture import capture, load_model
from export.fixed_point.checkpoint import resume, save
from export.fixed_point.deliver import deliver, sizes
from export.fixed_point.measure import Measured, measure
from export.fixed_point.network import Network
from export.fixed_point.power_of_two import scale_errors
from export.fixed_point.report import Report, plot, report
from export.fixed_point.settings import Settings, as_published, for_integers, in_float32
from export.fixed_point.train import Trainer
from export.pictures import Pictures, class_names, load_pictures
from export.pipeline import MOST_PICTURES, Options, export_model
from export.preprocessing import parse_preprocess
from export.progress import counted
from export.targets import TARGETS
from refold.atomic import check_output, make_directory, write_atomically
from refold.errors import InputError, ModelError, StorageError, UsageError
from refold.preprocess import Preprocess

__all__ = ["fixed_point_train"]

EVERY = 10**9  # pictures: all of them
FINE_RATE = 0.01  # where trained weights are gone on from: a step of 0.1 would be a tenth of a small tensor
CHECKPOINT, WEIGHTS, REPORT, PLOT = "checkpoint.pt", "trained.npz", "report.json", "training.png"


@click.command("fixed-point")
@click.argument("model")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Labelled: a folder with one folder for each class, or an npz with images and labels.",
)
@click.option("--preprocess", required=True, help="As in 32x32,imagenet or a TOML/JSON file: docs/guide/export.md.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for checkpoint.pt, trained.npz, report.json and training.png.",
)
@click.option("--input-size", metavar="WxH", help="Overrides the size in --preprocess.")
@click.option("--classes", help="Class names in label order: a,b,c or a file with one a line (folders only; default: sorted).")
@click.option("--weights", type=click.Path(path_type=Path), help="npz, safetensors or a torch state dict (never unpickled).")
@click.option("--evaluation", type=click.Path(path_type=Path), help="Pictures to measure on; default: a share of the others.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9),
    default=0.1,
    show_default=True,
    help="Share of --data to measure on instead of training on, where --evaluation is not given.",
)
@click.option(
    "--longest",
    type=click.IntRange(2, 8),
    default=8,
    show_default=True,
    help="Bits of the longest word. 7 loses nothing on x86 without VNNI.",
)
@click.option("--published", is_flag=True, help="The paper's words of up to 32 bits: layers then run in float.")
@click.option("--float32", is_flag=True, help="The same training without a quantiser: the baseline.")
@click.option("--strict", is_flag=True, help="A push-down may cost nothing at all, as in the paper.")
@click.option("--power-of-two", is_flag=True, help="Fold norms into powers of two, for targets that shift.")
@click.option("--epochs", type=click.IntRange(1), help="Default: 100.")
@click.option("--batch", type=click.IntRange(1), help="Pictures in a forward pass. Default: 512.")
@click.option("--accumulation", type=click.IntRange(1), help="Forward passes in a step. Default: 4.")
@click.option("--lr", "learning_rate", type=float, help="Default: 0.1 from scratch, 0.01 from the model's own weights.")
@click.option("--from-scratch", is_flag=True, help="Start at random weights.")
@click.option("--augment", is_flag=True, help="Mirror and shift pictures at random.")
@click.option("--set", "changed", multiple=True, metavar="NAME=VALUE", help="Any other setting: docs/guide/fixed-point.md.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option(
    "--target",
    type=click.Choice([name for name, profile in TARGETS.items() if profile.runtime == "ort"]),
    default="ort-x86-avx2",
    show_default=True,
    help="Engine whose accuracy and time are measured at the end.",
)
@click.option("--bundle", type=click.Path(path_type=Path), help="Also export what was trained: the .refold file to write.")
@click.option(
    "--checkpoint-every", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds between checkpoints."
)
@click.option("--restart", is_flag=True, help="Ignore a checkpoint that is there.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")  # fmt: skip
def fixed_point_train(
    model: str, data: Path, preprocess: str, input_size: str | None, classes: str | None, output: Path, weights: Path | None,
    evaluation: Path | None, held_out: float, longest: int, published: bool, float32: bool, strict: bool, power_of_two: bool,
    epochs: int | None, batch: int | None, accumulation: int | None, learning_rate: float | None, from_scratch: bool,
    augment: bool, changed: tuple[str, ...], seed: int, target: str,
    bundle: Path | None, checkpoint_every: float, restart: bool, threads: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Train MODEL (file.py:callable, package.module:callable or a .pt2) in adaptive fixed-point words (AdaPT).

    A run that was killed goes on from OUTPUT/checkpoint.pt when it is started again with the same options, and ends in the
    same bytes.
    """
    torch.set_num_threads(threads)
    if learning_rate is None and not from_scratch:
        learning_rate = FINE_RATE
    given: dict[str, Any] = {
        "epochs": epochs, "batch": batch, "accumulation": accumulation, "power_of_two": power_of_two or None,
        "learning_rate": learning_rate, "from_scratch": from_scratch, "augment": augment, "seed": seed,
        "tolerance": 0.0 if strict else None,
    }  # fmt: skip
    given = {**{k: v for k, v in given.items() if v is not None}, **_settings(changed)}
    settings = as_published(**given) if published else for_integers(longest, **given)
    settings = in_float32(settings) if float32 else settings
    if bundle is not None and float32:
        raise UsageError("A float32 training has no integers to export: leave --bundle out, or --float32.")
    if bundle is not None:
        check_output(bundle)
    try:
        make_directory(output)
    except OSError as e:
        raise StorageError(f"{output} cannot be made: {e.strerror or e}. Give another folder with --output.") from e
    check_output(output / REPORT)
    console = Console(stderr=True)
    plan = parse_preprocess(preprocess, input_size)
    names = class_names(classes)
    train, measured_on = _pictures(data, evaluation, held_out, plan, seed, names)
    module = load_model(model, weights)
    network = Network(capture(module, plan.height, plan.width), settings)
    trainer = Trainer(network, plan, *train, measured_on)
    checkpoint = output / CHECKPOINT
    if checkpoint.is_file() and not restart:
        resume(trainer, checkpoint)
        console.print(f"going on from step {trainer.state.step} of {trainer.steps}", highlight=False)
    _train(trainer, checkpoint, checkpoint_every, console, as_json)
    found = report(trainer)
    engines, extra = _engines(trainer, target, console)
    summary = {"output": str(output), **found.encode(), **extra}
    write_atomically(output / REPORT, [json.dumps({**summary, "settings": settings.encode()}, indent=1).encode(), b"\n"])
    missing = _write_weights(module, trainer, output / WEIGHTS)
    try:
        plot(trainer.state.epochs, output / PLOT)
    except ModuleNotFoundError:
        console.print("No picture: matplotlib is not installed (pip install matplotlib).", highlight=False)
    if bundle is not None:
        summary["bundle"] = _bundle(module, trainer, target, bundle, names, console)
    if missing:
        console.print(f"No {WEIGHTS}: the model has {missing} under no name of its own.", highlight=False)
    if as_json:
        click.echo(json.dumps(summary, indent=1))
    else:
        _tell(found, engines, extra, output, summary.get("bundle"))


def _settings(changed: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is a number, true, false, none, or two numbers with a comma."""
    found: dict[str, Any] = {}
    for text in changed:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in Settings.__dataclass_fields__:
            raise UsageError(f"--set {text!r}: give NAME=VALUE; there are {', '.join(Settings.__dataclass_fields__)}.")
        try:
            parts = [json.loads(p.strip().lower().replace("none", "null")) for p in value.split(",")]
        except ValueError:
            raise UsageError(f"--set {text!r}: {value!r} is not a number, true, false or none.") from None
        found[name] = tuple(parts) if len(parts) > 1 else parts[0]
    return found


def _pictures(
    source: Path, evaluation: Path | None, share: float, plan: Preprocess, seed: int, names: list[str]
) -> tuple[tuple[Any, Any], tuple[Any, Any] | None]:
    found = _labelled(load_pictures(source, plan, EVERY, names), source)
    if evaluation is not None:
        return found, _labelled(load_pictures(evaluation, plan, EVERY, names), evaluation)
    images, labels = found
    order = np.random.default_rng(seed).permutation(len(images))
    kept = order[: len(images) - int(share * len(images))]
    left = order[len(kept) :]
    return (images[np.sort(kept)], labels[np.sort(kept)]), (images[np.sort(left)], labels[np.sort(left)]) if len(left) else None


def _labelled(pictures: Pictures, source: Path) -> tuple[Any, Any]:
    if pictures.labels is None:
        raise InputError(
            f"The pictures in {source} have no labels: give a folder with one folder for each class, or an npz with `labels`.",
            code="labels",
        )
    return pictures.images, pictures.labels


def _train(trainer: Trainer, checkpoint: Path, every: float, console: Console, quiet: bool) -> None:
    saved = time.monotonic()
    with Progress(SpinnerColumn(), *counted(), console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("training", total=trainer.steps, completed=trainer.state.step)

        def after(t: Trainer) -> None:
            nonlocal saved
            state, ended = t.state, t.state.step % t.steps_in_epoch == 0
            bar.update(task, completed=state.step, description=f"loss {state.losses[-1]:.3f}")
            if ended and not console.is_terminal and not quiet:
                e = state.epochs[-1]
                told = f"epoch {e.number} of {t.settings.epochs}: loss {e.loss:.4f}, accuracy {e.accuracy:.3f}, "
                console.print(f"{told}{e.average_word:.1f} bits, {e.sparsity:.1%} zeros", highlight=False)
            if time.monotonic() - saved >= every or state.step == t.steps:
                save(t, checkpoint)
                saved = time.monotonic()

        trainer.run(after)


def _engines(trainer: Trainer, target: str, console: Console) -> tuple[Measured | None, dict[str, Any]]:
    """The engine's accuracy and time, bytes, and the error of folded powers of two; nothing for a float32 training."""
    network = trainer.network
    if network.settings.float32:
        return None, {}
    delivery = deliver(network, TARGETS[target].qmax)
    extra: dict[str, Any] = {"bytes": sizes(delivery), "shortened": dict(delivery.shortened)}
    images, labels = trainer.held_out if trainer.held_out is not None else (trainer.images[:1], None)
    shifted = network.settings.power_of_two
    try:
        found = measure(delivery, TARGETS[target], trainer.preprocess.apply(images), labels, shifted)
    except ModelError as e:  # no norm, or one used twice: trained all right, but no bundle can be made of it
        console.print(f"No engine was measured. {e.message}", highlight=False)
        return None, extra
    errors = scale_errors(delivery.integers(power_of_two=True).table) if delivery.given.weights else ()
    extra["measured"] = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(found).items()}
    extra["power_of_two"] = {"used": shifted, "sites": {e.site: {"largest": e.largest, "rms": e.rms} for e in errors}}
    return found, extra


def _bundle(
    module: nn.Module | ExportedProgram, trainer: Trainer, target: str, path: Path, names: list[str], console: Console
) -> dict[str, Any]:
    """The trained integers in a bundle, with every self-check. Raises as `export.pipeline.export_model`."""
    delivery = deliver(trainer.network, TARGETS[target].qmax)
    given = replace(delivery.given, stored=delivery.stored, power_of_two=trainer.network.settings.power_of_two)
    # Powers of two change the function, by as much as the report says: the checks then hold for what it has become.
    least = 0.0 if given.power_of_two else Options().min_agreement
    kept = [glob_of(name) for name in delivery.keep_float]
    options = Options((target,), path.stem, names, keep_float=kept, min_agreement=least)
    pictures = Pictures(trainer.images[:MOST_PICTURES], trainer.labels[:MOST_PICTURES])
    done = export_model(
        module, path, trainer.preprocess, pictures, options, given=given,
        progress=lambda what: console.print(what, highlight=False),
    )  # fmt: skip
    return {
        "path": str(path),
        "digest": done.bundle.digest,
        "bytes": done.bundle.size,
        "checks": dict(done.checks[target]),
        "warnings": [f.told() for f in done.findings],
    }


def _write_weights(module: nn.Module | ExportedProgram, trainer: Trainer, path: Path) -> str:
    """`trained.npz`, for --weights. Returns the first trained tensor that the model's state has no place for, or ""."""
    state = {k: v.detach().cpu().numpy() for k, v in dict(module.state_dict if isinstance(module, ExportedProgram)
                                                          else module.state_dict()).items()}  # fmt: skip
    net = trainer.network
    trained = {n: t.detach().numpy() for n, t in {**net.quantised, **net.statistics}.items()}
    for name, value in trained.items():
        if name not in state or state[name].shape != value.shape:
            if name in net.master:
                return name
            continue
        state[name] = value
    out = io.BytesIO()
    np.savez(out, **state)
    write_atomically(path, [out.getvalue()])
    return ""


def _tell(found: Report, measured: Measured | None, extra: dict[str, Any], output: Path, bundle: dict[str, Any] | None) -> None:
    width = max(len(layer.name) for layer in found.layers)
    for layer in found.layers:
        form = f"<{layer.word},{layer.fraction}>" if extra else "float32"
        click.echo(
            f"{layer.name:{width}}  {form:>8}  {layer.size:>9,} weights  {layer.sparsity:6.1%} zeros  {layer.macs:>12,} MAC"
        )
    click.echo(f"held-out accuracy {found.accuracy:.4f}, loss {found.loss:.4f}, {found.steps} steps, {found.switches} switches")
    click.echo(
        f"{found.average_word:.2f} bits a weight, {found.sparsity:.1%} zeros; size ÷ float32 {found.size_ratio:.3f} "
        f"(with zeros {found.size_ratio_with_zeros:.3f}; unweighted, as published, {found.size_ratio_unweighted:.3f})"
    )
    click.echo(
        f"modelled, not measured: training {found.modelled_training_speed_up:.2f} times, inference "
        f"{found.modelled_inference_speed_up:.2f} times as fast as float32, in multiplications times bits"
    )
    if measured is not None:
        click.echo(
            f"measured on {measured.target}: accuracy {measured.accuracy:.4f}, {measured.integer_ms:.3f} ms against "
            f"{measured.float_ms:.3f} ms in float32 ({measured.speed_up:.2f} times as fast), "
            f"{measured.integer_layers} integer layers"
        )
    if extra:
        told = extra["bytes"]
        click.echo(
            f"weights {told['delivered']:,} bytes, deflated {told['delivered_deflated']:,}; "
            f"float32 {told['float32']:,}, deflated {told['float32_deflated']:,}"
        )
    if bundle:
        click.echo(f"{bundle['path']}  {bundle['bytes']:,} bytes  digest {bundle['digest'][:16]}; every check passed")
        for warning in bundle["warnings"]:
            click.echo(f"warning: {warning['message']} [{warning['code']}]", err=True)
    click.echo(str(output))
