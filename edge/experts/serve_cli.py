"""`refold edge serve-llm`: the model of a bundle behind OpenAI's API, for programs on this machine."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.experts.generate_cli import loaded, running_options, sampling_of, sampling_options, settings_of, trust_options
from refold.errors import UsageError

if TYPE_CHECKING:
    from edge.experts.model import Running
    from edge.experts.release import Live

__all__ = ["serve_llm"]


@click.command("serve-llm")
@click.argument("bundle", type=click.Path(path_type=Path))
@running_options
@sampling_options
@trust_options
@click.option("--port", type=int, default=8080, show_default=True, help="On 127.0.0.1; 0 takes any free one and says which.")
@click.option("--waiting", type=int, default=16, show_default=True, help="Requests that may wait for their turn.")
@click.option("--grace", type=float, default=60.0, show_default=True, help="Seconds that texts get to end after SIGTERM.")
def serve_llm(bundle: Path, port: int, waiting: int, grace: float, **flags: Any) -> None:
    """Serve the language model in BUNDLE to OpenAI clients on this machine, until SIGTERM or Ctrl-C."""
    from edge.experts.serve import Server, ServeSettings

    settings = ServeSettings(port=port, waiting=waiting, grace=grace, defaults=sampling_of(flags))
    with loaded(bundle, settings_of(flags)) as running, ExitStack() as stack:
        live, why_none = _live(running, flags, stack)
        server = Server(running, settings, live, why_none)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.drain())
        click.echo(
            f"Serving {running.name} on http://127.0.0.1:{server.port}/v1, release {live.version if live else 0}, "
            f"{running.pager.budget / 1e6:,.1f} MB for {running.paged.index.total / 1e6:,.1f} MB of experts. "
            f"{why_none and 'Releases are off: ' + why_none}",
            err=True,
        )
        server.run()
    click.echo("Ended; no text was cut off." if not server.cut_off else "Ended; texts were cut off.", err=True)


def _live(running: Running, flags: dict[str, Any], stack: ExitStack) -> tuple[Live | None, str]:
    """The device's updater, with `--release` offered to it; or why there is none."""
    from edge.experts.release import Live, read, trust

    try:
        who = trust(flags["data"], flags["keys"], flags["cohort"])
        live = Live(running.paged.bundle, who, flags["data"], running.put_gains)
    except UsageError as e:
        if e.code != "not-enrolled" or flags["release"] is not None:
            raise
        return None, e.message
    stack.callback(live.close)
    if flags["release"] is not None:
        live.offer(read(flags["release"]).SerializeToString())
    return live, ""
