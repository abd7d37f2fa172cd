"""`refold export experts`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn

from export.experts.factor import Factoring, discard, factor, factored_folder
from export.experts.factor_router import RouterSettings
from export.experts.pipeline import MIXED, Options, Watcher, export_experts
from export.experts.report import lines
from export.progress import counted
from refold.errors import UsageError
from refold.signing import SigningKey
from refold.sizes import parse_size

__all__ = ["experts"]


def parse_share(text: str) -> float:
    """0.01 from `1%` or `0.01`. Raises UsageError."""
    try:
        return float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{text!r} is no share: write 1% or 0.01.") from None


@click.command("experts")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .refold file to write.")
@click.option(
    "--bits",
    type=click.Choice(["8", "4", "2", MIXED]),
    help="Of every expert; mixed: chosen for each. Default: 4, or mixed where a bound is given.",
)
@click.option("--group", type=int, help="Neighbours that share a scale. Default: 64, or 32 where widths ask for it.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Calibration text; repeat for several. Perplexity and routing are measured on it.",
)
@click.option("--max-perplexity-increase", "tolerance", metavar="SHARE", help="As few bytes as stay within it, e.g. 1%.")
@click.option("--size", metavar="SIZE", help="As little loss as fits into it, e.g. 2.1MB: bytes of all experts.")
@click.option(
    "--importance",
    type=click.Choice(["loss", "output"]),
    default="loss",
    show_default=True,
    help="loss: of each expert alone, two measurements each. output: of its layer's output, one pass for all.",
)
@click.option("--windows", type=click.IntRange(1), default=128, show_default=True, help="Pieces of text to measure on.")
@click.option("--window", "length", type=click.IntRange(2), default=128, show_default=True, help="Tokens in each.")
@click.option("--cache", metavar="SIZE", default="1GiB", show_default=True, help="Memory for experts while measuring.")
@click.option(
    "--factor", "parts", type=int, metavar="N", help="CHECKPOINT is a dense Llama, or llama2.c's: cut it into N experts."
)
@click.option("--active", type=click.IntRange(1), metavar="K", help="Of N that a token uses. Default: N, which loses nothing.")
@click.option(
    "--scaling",
    type=click.Choice(["sum", "paper"]),
    default="sum",
    show_default=True,
    help="Of the K experts' sum: as it is, or times N / K as FactorLLM has it.",
)
@click.option(
    "--split",
    type=click.Choice(["clusters", "slices"]),
    default="clusters",
    show_default=True,
    help="An expert: neurons that are active together, or neighbours as in FactorLLM.",
)
@click.option(
    "--router-text",
    "router_texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="What the routers of --factor learn from. Default: text that the dense model writes itself.",
)
@click.option("--router-steps", type=click.IntRange(0), default=RouterSettings.steps, show_default=True)
@click.option("--plot/--no-plot", default=True, show_default=True, help="The heat-map OUTPUT.bits.png, where bits are chosen.")
@click.option("--name", help="Name of the model; default: the output's.")
@click.option("--key", "keys", multiple=True, type=click.Path(path_type=Path), help="Sign with this private key (PEM).")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--leave-unused", "unused", is_flag=True, help="Leave out tensors that config.json gives no place to.")
@click.option("--json", "json_", is_flag=True, help="For machines.")
def experts(
    checkpoint: Path, output: Path, bits: str | None, group: int | None, texts: tuple[Path, ...], tolerance: str | None,
    size: str | None, importance: str, windows: int, length: int, cache: str, parts: int | None, active: int | None,
    scaling: str, split: str, router_texts: tuple[Path, ...], router_steps: int, plot: bool, name: str | None,
    keys: tuple[Path, ...], threads: int, unused: bool, json_: bool,
) -> None:  # fmt: skip
    """Page the experts of CHECKPOINT, a Hugging Face folder with config.json and safetensors.

    With --factor, CHECKPOINT is dense and gets experts first: see docs/guide/experts-factor.md.

    An export that was killed goes on where it was when it is started again with the same options.
    """
    torch.set_num_threads(threads)
    bounded = tolerance is not None or size is not None
    wanted = bits or (MIXED if bounded else "4")
    options = Options(
        MIXED if wanted == MIXED else int(wanted), group, texts, windows, length,
        None if tolerance is None else parse_share(tolerance), None if size is None else parse_size(size),
        importance, parse_size(cache), threads, name or "", unused,
    )  # fmt: skip
    signers = [SigningKey.load(k) for k in keys]
    factoring = None
    if parts is not None:
        routers = RouterSettings(steps=router_steps)
        factoring = Factoring(parts, active or parts, scaling, split, router_texts, measured=texts, router=routers)
    elif active is not None or router_texts:
        raise UsageError("--active and --router-text belong to --factor.")
    picture = output.with_suffix(".bits.png") if plot and options.searches else None
    console = Console(stderr=True)
    with Progress(SpinnerColumn(), *counted(), console=console, transient=True, disable=json_) as bar:
        task = bar.add_task("starting", total=None)

        def stage(what: str, steps: int) -> None:
            bar.reset(task, description=what, total=steps or None)
            if not console.is_terminal and not json_:
                console.print(what, highlight=False)

        watch = Watcher(stage, lambda n: bar.advance(task, n))
        if factoring is not None:
            folder = factored_folder(output)
            cut = factor(checkpoint, folder, factoring, stage, lambda n: bar.advance(task, n))
            checkpoint = folder
        told = export_experts(checkpoint, output, options, *signers, watch=watch, picture=picture)
    if factoring is not None:
        discard(checkpoint)
    if json_:
        click.echo(json.dumps(told.to_json() | ({"factored": cut.to_json()} if factoring is not None else {}), indent=1))
        return
    for line in cut.lines() if factoring is not None else ():
        click.echo(line)
    for warning in told.warnings:
        click.echo(warning, err=True)
    for line in lines(told):
        click.echo(line)
