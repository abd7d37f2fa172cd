"""Options that every `refold cloud` command has, and how its answer is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

__all__ = ["config_option", "json_option", "say"]

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("cloud.toml"),
    show_default=True,
    help="Settings file (`refold cloud init`).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="For machines.")


def say(as_json: bool, values: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(values) if as_json else text)
