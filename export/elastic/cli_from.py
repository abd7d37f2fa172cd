"""`refold export --from RUN --configuration NAME -o m.refold`: a bundle of one configuration of an elastic training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from rich.console import Console

from export.diagnose.report import check_lines, warning_lines
from export.elastic.deliver import Workshop, deliver
from export.elastic.folder import RunFolder
from export.elastic.space import bit_operations, byte_count
from export.pipeline import MOST_PICTURES, Options, export_model
from export.targets import TARGETS, target_named
from refold.atomic import check_output
from refold.signing import SigningKey

__all__ = ["export_from"]


@click.command()
@click.option("--from", "run", type=click.Path(path_type=Path), required=True, help="Folder of `refold export train`.")
@click.option("--configuration", required=True, help="w4a8 and the like, the name of a search's result, or a JSON file.")
@click.option(
    "--target", "targets", multiple=True, default=("ort-x86-avx2",), show_default=True, type=click.Choice(list(TARGETS)),
    help="Repeat for several.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The .refold file to write.")
@click.option("--data", type=click.Path(path_type=Path), help="The training's pictures, if they lie elsewhere now.")
@click.option("--name", help="Name of the model; default: the output's.")
@click.option("--sample-limit", type=click.IntRange(1, MOST_PICTURES), default=512, show_default=True, help="Pictures to keep.")
@click.option(
    "--min-agreement", type=click.FloatRange(0, 1), default=0.9, show_default=True,
    help="Share of pictures on which the engine must choose the class that the trained net chooses.",
)  # fmt: skip
@click.option("--key", "keys", multiple=True, type=click.Path(path_type=Path), help="Sign with this private key (PEM).")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def export_from(
    run: Path, configuration: str, targets: tuple[str, ...], output: Path, data: Path | None, name: str | None,
    sample_limit: int, min_agreement: float, keys: tuple[Path, ...], threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Export one configuration of an elastic training into a bundle, integers and scales as they were trained."""
    torch.set_num_threads(threads)
    check_output(output)
    started, console = time.monotonic(), Console(stderr=True, quiet=as_json)
    signers = [SigningKey.load(k) for k in keys]
    console.print("opening the run", highlight=False)
    shop = Workshop.open(RunFolder(run), data, min(target_named(t).qmax for t in targets))
    chosen = shop.configuration(configuration)
    console.print("measuring the norms of this configuration", highlight=False)
    delivery = deliver(shop, chosen)
    options = Options(targets, name or output.stem, shop.settings.classes, min_agreement=min_agreement)
    pictures = shop.pictures(sample_limit)
    done = export_model(
        delivery.program, output, shop.settings.preprocess, pictures, options, keys=signers,
        progress=lambda what: console.print(what, highlight=False), given=delivery.given,
    )  # fmt: skip
    layout = shop.judge.supernet.layout
    told = {
        "path": str(done.bundle.path), "digest": done.bundle.digest, "bytes": done.bundle.size, "configuration": configuration,
        "accuracy": delivery.accuracy, "held_out": len(shop.judge.held), "configuration_bytes": byte_count(layout, chosen),
        "bit_operations": bit_operations(layout, chosen), "seconds": round(time.monotonic() - started, 1),
        "checks": {t: dict(c) for t, c in done.checks.items()}, "warnings": [f.told() for f in done.findings],
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    click.echo(f"{done.bundle.path}  {done.bundle.size:,} bytes  digest {done.bundle.digest[:16]}  {told['seconds']:.0f} s")
    click.echo(
        f"{configuration}: {delivery.accuracy:.1%} on {told['held_out']} held-out pictures; {told['configuration_bytes']:,} "
        f"bytes packed, {told['bit_operations']:,} bit operations"
    )
    for line in check_lines(done.checks, done.findings, len(pictures.images)):
        click.echo(line)
    for line in warning_lines(done.findings):
        click.echo(line, err=True)
