"""`refold`: one command, its subcommands loaded only when asked for, so that a device never imports torch."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from typing import Any

import click

from refold import __version__
from refold.errors import InternalError, RefoldError, StorageError

__all__ = ["main"]

COMMANDS = {
    "export": ("export.cli", "export", "Quantise a PyTorch model into a bundle.", "export"),
    "inspect": ("refold.inspection", "inspect", "Print what is inside a bundle.", ""),
    "extract": ("refold.inspection", "extract", "Unpack a bundle (its models open in Netron).", ""),
    "verify": ("refold.inspection", "verify", "Check every digest and signature of a bundle.", ""),
    "edge": ("edge.cli", "edge", "Run the device daemon.", ""),
    "cloud": ("cloud.cli", "cloud", "Run and steer the adaptation service.", "cloud"),
    "demo": ("demo.cli", "demo", "See the whole loop on this machine.", "demo"),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _, extra = COMMANDS[name]
        try:
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
        except ModuleNotFoundError as e:
            if e.name and e.name.partition(".")[0] in ("export", "edge", "cloud", "demo", "refold"):
                raise
            wanted = f"pip install 'refold[{extra}]'" if extra else f"pip install {e.name}"
            raise click.ClickException(f"`refold {name}` needs {e.name}, which is not installed: {wanted}") from e

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row[2]) for name, row in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="refold")
@click.option("--debug", is_flag=True, help="Log details and show tracebacks.")
def cli(debug: bool) -> None:
    """Frozen integers, living norms: ship a quantised model once, adapt it for ever."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if debug:
        os.environ["REFOLD_DEBUG"] = "1"


def main(argv: list[str] | None = None) -> Any:
    """Runs the command; a RefoldError becomes its sentence on stderr and its exit code, Ctrl-C becomes 130.

    An exception nobody expected becomes a sentence, too, and exit code 70; with --debug, or REFOLD_DEBUG set, it passes.
    """
    args = sys.argv[1:] if argv is None else argv
    try:
        return cli.main(args=args, prog_name="refold", standalone_mode=False)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  (Python flushes it when it ends)
        sys.exit(1)
    except Exception as e:
        if os.environ.get("REFOLD_DEBUG"):
            raise
        told = _told(e, args)
        if "--json" in args:
            click.echo(json.dumps({"error": {"code": told.code, "message": told.message}}))
        click.echo(f"refold: {told.message}", err=True)
        sys.exit(told.exit_code)


def _told(e: Exception, args: list[str]) -> RefoldError:
    if isinstance(e, RefoldError):
        return e
    if isinstance(e, OSError):
        return StorageError(f"{f'{e.filename}: ' if e.filename else ''}{e.strerror or e}. Check the path and the disk.")
    command = " ".join(["refold", *args[:1]])
    said = next((line.strip() for line in str(e).splitlines() if line.strip()), "")[:300].rstrip(".")
    return InternalError(
        f"`{command}` failed inside Refold ({type(e).__name__}{f': {said}' if said else ''}). Please report it with what "
        f"`refold --debug {' '.join(args[:1])} ...` prints."
    )


if __name__ == "__main__":
    main()
