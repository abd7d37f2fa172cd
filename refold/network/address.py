"""Where something listens: `host:port`, checked in its form before anything is asked of a network.

Accepted is what gRPC itself names a TCP server with: host:port, [IPv6]:port, and either after `dns:`, `dns:///`, `ipv4:` or
`ipv6:` (https://github.com/grpc/grpc/blob/master/doc/naming.md). A URL, a missing port, an IPv6 address without brackets and a
socket of another kind are each refused with the form that is expected.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from refold.configuration.schema import NotEmpty

__all__ = ["Address", "CloudAddress", "EnrolAddress", "HostName", "ServerName", "check_host", "join", "parse_address"]

MAIN_PORT, ENROL_PORT = 7443, 7444  # the service's defaults, for examples in messages
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
OTHER_KINDS = re.compile(r"(unix|unix-abstract|vsock|xds|google-c2p):", re.IGNORECASE)
TCP = re.compile(r"dns:(///|(?!//))|ipv[46]:")
LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True)
class Address:
    """A TCP address. `host` without brackets; `str` gives what gRPC takes."""

    host: str
    port: int

    def __str__(self) -> str:
        return join(self.host, self.port)


def join(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, port: int = MAIN_PORT) -> Address:
    """An address to connect to.

    Args:
        port: the usual one, for the example in a message.

    Raises:
        ValueError: a sentence about what is wrong and what is expected.
    """
    bare = TCP.sub("", text.strip())
    if not bare:
        raise ValueError(f"an address is host:port, for example cloud.example.org:{port}")
    if bare.startswith("dns://"):
        raise ValueError("a resolver cannot be named here; the address after the last slash is enough")
    if SCHEME.match(bare):
        raise ValueError(f"that is a URL; an address is host:port, without a scheme or a path{_instead(bare, port)}")
    if OTHER_KINDS.match(bare):
        raise ValueError(f"only TCP is spoken here; an address is host:port, for example cloud.example.org:{port}")
    if "/" in bare:
        raise ValueError("a path does not belong to an address, which is host:port")
    host, number = _split(bare, port)
    return Address(check_host(host), _port(number, host))


def _instead(url: str, port: int) -> str:
    try:
        parts = urlsplit(url)
        return f": write {join(check_host(parts.hostname or ''), parts.port or port)}"
    except ValueError:
        return f", for example cloud.example.org:{port}"


def _split(text: str, port: int) -> tuple[str, str]:
    if text.startswith("["):
        inside, bracket, rest = text[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise ValueError(f"an IPv6 address is written [address]:port, for example [{inside or '::1'}]:{port}")
        if ":" not in inside:
            raise ValueError(f"brackets are for IPv6 addresses; write {inside}{rest}")
        return inside, rest[1:]
    if text.count(":") > 1:
        raise ValueError(f"an IPv6 address stands in brackets, as in [::1]:{port}; any other address is host:port")
    host, colon, number = text.partition(":")
    if not colon or not number:
        raise ValueError(f"the port is missing; an address is host:port, for example {host}:{port}")
    if not host:
        raise ValueError(f"the host is missing; an address is host:port, for example cloud.example.org:{number}")
    return host, number


def _port(text: str, host: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= 65_535 or len(text) > 9:
        raise ValueError(f"{text!r} is no port; ports are 1 to 65535, as in {join(host, MAIN_PORT)}")
    return int(text)


def check_host(text: str) -> str:
    """A host's name or address, without a port: the same without brackets and spaces around it.

    Raises:
        ValueError: a sentence about what is wrong and what is expected.
    """
    host = text.strip()
    if SCHEME.match(host) or "/" in host:
        raise ValueError("that is a URL or a path; a host is a name or an address, as in cloud.example.org or 192.0.2.7")
    if OTHER_KINDS.match(host):
        raise ValueError("only TCP is spoken here; a host is a name or an address, as in cloud.example.org or 192.0.2.7")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            before, _, after = host.rpartition(":")
            if after.isdigit() and ":" not in before.strip("[]").replace("::", ""):
                raise ValueError(f"a port does not belong here; the host alone is {before.strip('[]')}") from None
            raise ValueError("that is no IPv6 address") from None
        return host
    if not host:
        raise ValueError("the host is missing; it is a name or an address, as in cloud.example.org or 192.0.2.7")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise ValueError(f"{host} is no IPv4 address, which is four numbers from 0 to 255") from None
        return host
    if len(host) > 253 or not all(LABEL.fullmatch(label) for label in host.removesuffix(".").split(".")):
        raise ValueError(
            "a host's name is letters, digits and hyphens between dots; a name in another script is written in its xn-- form"
        )
    return host


def _same(text: str, port: int) -> str:
    return str(parse_address(text, port))


CloudAddress = Annotated[str, AfterValidator(partial(_same, port=MAIN_PORT))]
EnrolAddress = Annotated[str, NotEmpty(), AfterValidator(lambda text: text and _same(text, ENROL_PORT))]
HostName = Annotated[str, AfterValidator(check_host)]
ServerName = Annotated[str, NotEmpty(), AfterValidator(lambda text: text and check_host(text))]
