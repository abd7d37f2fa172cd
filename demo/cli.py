"""`refold demo`: the whole loop on this machine, then a report, then the claims as the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refold.atomic import write_atomically
from refold.errors import GateError, StorageError

__all__ = ["demo"]

FRAMES = 6000
QUICK_FRAMES = 4400


@click.command()
@click.option("--quick", is_flag=True, help=f"{QUICK_FRAMES:,} frames instead of {FRAMES:,}; the same claims.")
@click.option("--frames", type=click.IntRange(min=1), help="Frames in all; at least 400.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Order of pictures, fog and noise.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder of the report."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("demo-run"),
    show_default=True,
    help="Folder of the run's own files.",
)
@click.option("--digits", is_flag=True, help="scikit-learn's digits instead of CIFAR-10.")
@click.option("--no-live", is_flag=True, help="Lines instead of a live panel.")
@click.option("--json", "as_json", is_flag=True, help="The report on standard output as well.")
def demo(
    quick: bool, frames: int | None, seed: int, output: Path, work: Path, digits: bool, no_live: bool, as_json: bool
) -> None:
    """See the whole loop on this machine: a shipped int8 engine meets fog and noise and adapts, over gRPC with TLS.

    Ends with report.html and report.json in the output folder. Exit status 0: every claim holds; 10: one does not.
    """
    from demo.page import render
    from demo.report import failed
    from demo.run import Options, run
    from demo.view import make_view

    options = Options(frames or (QUICK_FRAMES if quick else FRAMES), seed, work, digits)
    output = output.absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"{output} cannot be made: {e.strerror or e}. Give another folder with --output.") from e
    with make_view(live=not no_live) as view:
        report = run(options, view)
    content = json.dumps(report, indent=1, allow_nan=False)
    write_atomically(output / "report.json", [content.encode(), b"\n"])
    write_atomically(output / "report.html", [render(report).encode()])
    if as_json:
        click.echo(content)
    else:
        _summary(report, output)
    broken = failed(report)
    if broken:
        raise GateError("The demo ran to its end, but not every claim holds: " + " ".join(broken), code="claims")


def _summary(report: dict[str, object], output: Path) -> None:
    claims = report["claims"]
    assert isinstance(claims, list)
    width = max(len(c["text"]) for c in claims)
    for c in claims:
        mark = click.style("holds", fg="green") if c["holds"] else click.style("does not hold", fg="red")
        click.echo(f"{c['text']:{width}}  {c['value']:8g}  {c['bar']:>9}  {mark}")
    click.echo(f"{output / 'report.html'}")
