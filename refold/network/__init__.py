"""What every program needs of a network: addresses in their form, TLS files in pairs, reasons of failed calls."""

from refold.network.address import Address, CloudAddress, EnrolAddress, HostName, ServerName, check_host, join, parse_address
from refold.network.reason import is_tls, meaning_of, reason_of

__all__ = [
    "Address",
    "CloudAddress",
    "EnrolAddress",
    "HostName",
    "ServerName",
    "check_host",
    "is_tls",
    "join",
    "meaning_of",
    "parse_address",
    "reason_of",
]
