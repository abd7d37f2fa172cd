"""`refold cloud operator ...`: who may steer the fleet. Needs the authority's key, and no running service."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloud.fleet.options import config_option, json_option, say
from cloud.settings import load_settings

if TYPE_CHECKING:  # a command that only prints its help loads no database
    from cloud.store import OperatorRecord
    from cloud.store.operators import OperatorRows

__all__ = ["operator"]

DAYS = 365.0
out_option = click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of NAME.pem and NAME.key; default: operators/ beside the settings."
)
days_option = click.option("--days", default=DAYS, show_default=True, help="How long the certificate lasts.")


@click.group()
def operator() -> None:
    """Make, renew, revoke and list the operators of a fleet."""


@contextmanager
def _rows(config: Path) -> Iterator[tuple[OperatorRows, Any]]:
    """The operators' rows and the fleet's authority; the operator that `init` made is among them."""
    from cloud.fleet.operators import adopt_file
    from cloud.identity import Authority
    from cloud.store import Store

    settings = load_settings(config)
    authority = Authority.load(settings.tls.ca, settings.tls.ca_key)
    store = Store(settings.storage.database)
    try:
        adopt_file(store.operators, config.parent / "operator.pem", authority)
        yield store.operators, authority
    finally:
        store.close()


def _day(unix_ms: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(unix_ms / 1000))


def _made(record: OperatorRecord, pair: Any, as_json: bool, text: str) -> None:
    values = {
        "operator": record.name,
        "serial": record.serial,
        "expires_unix_ms": record.expires_ms,
        "certificate": str(pair.certificate),
        "key": str(pair.key),
    }
    say(as_json, values, f"{text} It lasts until {_day(record.expires_ms)}: {pair.certificate} and {pair.key}.")


def _pair(config: Path, name: str, out: Path | None) -> Any:
    from cloud.fleet.operators import Pair, pair_of

    return Pair(out / f"{name}.pem", out / f"{name}.key") if out else pair_of(config.parent, name)


@operator.command()
@click.argument("name")
@days_option
@out_option
@config_option
@json_option
def issue(name: str, days: float, out: Path | None, config: Path, as_json: bool) -> None:
    """Make NAME an operator, with a key and a certificate of his own."""
    from cloud.fleet.operators import Pair
    from cloud.fleet.operators import issue as make

    folder = out or config.parent / "operators"
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    with _rows(config) as (rows, authority):
        record = make(rows, authority, name, days, pair)
    _made(record, pair, as_json, f"{name} is an operator.")


@operator.command()
@click.argument("name", default="operator")
@days_option
@out_option
@click.option("--replace", is_flag=True, help="Refuse the earlier certificates from now on; else they last until they expire.")
@config_option
@json_option
def renew(name: str, days: float, out: Path | None, replace: bool, config: Path, as_json: bool) -> None:
    """Give NAME (default: operator) a new key and certificate in place of the old files, before or after those expire."""
    from cloud.fleet.operators import renew as make

    pair = _pair(config, name, out)
    with _rows(config) as (rows, authority):
        record = make(rows, authority, name, days, pair, replace=replace)
    _made(record, pair, as_json, f"{name} has a new certificate{'; the earlier ones are refused' if replace else ''}.")


@operator.command()
@click.argument("name")
@config_option
@json_option
def revoke(name: str, config: Path, as_json: bool) -> None:
    """Refuse every certificate of NAME from now on, in a running service too. The last operator stays."""
    with _rows(config) as (rows, _):
        ended = rows.revoke(name)
    say(as_json, {"operator": name, "revoked": ended}, f"{name} is revoked ({ended} certificate(s)).")


@operator.command("list")
@config_option
@json_option
def list_operators(config: Path, as_json: bool) -> None:
    """Every certificate an operator was given, and whether it is valid."""
    from cloud.fleet.operators import expiry_warnings, state_of
    from cloud.show import show_operators

    with _rows(config) as (rows, _):
        records = rows.all()
    now = int(time.time() * 1000)
    values = [
        {
            "operator": r.name,
            "role": r.role,
            "serial": r.serial,
            "issued_unix_ms": r.issued_ms,
            "expires_unix_ms": r.expires_ms,
            "revoked_unix_ms": r.revoked_ms,
            "state": state_of(r, now),
        }
        for r in records
    ]
    if as_json:
        say(True, {"operators": values, "warnings": expiry_warnings(records, now)}, "")
    else:
        show_operators([(r.name, r.role, r.serial, _day(r.expires_ms), state_of(r, now)) for r in records])
        for warning in expiry_warnings(records, now):
            click.echo(warning)
