"""`refold cloud init`: a fleet's authority, certificates, signing key and settings, in one directory."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cloud.identity import Authority, write_private
from cloud.settings import commented_toml
from refold.atomic import discard, make_directory, write_atomically
from refold.errors import RefoldError, StorageError, UsageError
from refold.signing import SigningKey

__all__ = ["LOCAL", "default_hosts", "provision", "renew_server"]

LOCAL = ("localhost", "127.0.0.1")


def default_hosts() -> list[str]:
    """localhost, 127.0.0.1 and this machine's name."""
    return list(dict.fromkeys([*LOCAL, socket.gethostname()]))


def provision(directory: Path, hosts: Sequence[str], port: int, enrol_port: int, address: str) -> Path:
    """Fills a new directory; returns the settings file.

    Raises:
        UsageError: the directory already holds a fleet.
        StorageError: it cannot be written.
    """
    config = directory / "cloud.toml"
    if config.exists() or (directory / "ca.key").exists():
        raise UsageError(f"{directory} already holds a fleet: nothing was changed. Choose another directory.", code="exists")
    before: set[Path] | None = None
    try:
        make_directory(directory, mode=0o700)
        before = set(directory.iterdir())
        authority = Authority.make(f"Refold fleet of {socket.gethostname()}"[:64])
        authority.save(directory / "ca.pem", directory / "ca.key")
        _write_pair(directory / "server.pem", directory / "server.key", authority.issue_server(hosts))
        _write_pair(directory / "operator.pem", directory / "operator.key", authority.issue_operator("operator"))
        key = SigningKey.generate()
        key.save(directory / "release.key")
        write_atomically(directory / "release.pub", [key.public.hex().encode() + b"\n"])
        chosen = {"server": {"address": address, "port": port, "enrol_port": enrol_port}}
        write_atomically(config, [commented_toml(chosen).encode()])
    except (OSError, RefoldError) as e:
        _take_back(directory, before)  # half a fleet would stand in the way of the next try
        if isinstance(e, OSError):
            raise StorageError(f"{directory} cannot be written: {e.strerror}.") from e
        raise
    return config


def _take_back(directory: Path, before: set[Path] | None) -> None:
    if before is not None:
        with suppress(OSError):
            for path in set(directory.iterdir()) - before:
                discard(path)


def renew_server(certificate: Path, key: Path, authority: Authority, hosts: Sequence[str]) -> None:
    """Replaces the server's certificate and key, for new names or after it expired."""
    pem, private = authority.issue_server(hosts)
    write_atomically(key, [private], mode=0o600)
    write_atomically(certificate, [pem])


def _write_pair(certificate: Path, key: Path, pair: tuple[bytes, bytes]) -> None:
    write_private(key, pair[1])
    write_atomically(certificate, [pair[0]])
