"""Why a gRPC call failed, in gRPC's own words without their envelope, and what such a reason usually means."""

from __future__ import annotations

import re
from urllib.parse import unquote

__all__ = ["is_tls", "meaning_of", "reason_of"]

ENVELOPE = re.compile(r"^failed to connect to all addresses; last error: (?:[A-Z_]+: )?")
LONGEST = 300  # characters of a reason: a certificate chain's complaints can fill pages
TLS = ("SSL_ERROR", "CERTIFICATE", "Hostname Verification", "Tls handshake", "Ssl handshake")
MEANINGS = (  # of the first part that is found
    ("Connection refused", "Nothing listens there: is the port right, and does the service run?"),
    ("lookup", "The name is not known where this machine asks for names."),
    ("resol", "The name is not known where this machine asks for names."),
    ("WRONG_VERSION_NUMBER", "What answers there does not speak TLS: is it another program's port?"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "The two certificates do not accept each other: the server's is not under the CA that is trusted here, or not valid "
        "now. Check the CA file, the address and both clocks.",
    ),
    (
        "Hostname Verification",
        "The server's certificate is for another name: use that name, set server_name, or make the certificate anew for this "
        "one.",
    ),
    ("PEER_DID_NOT_RETURN", "The server wants a client certificate: the port for enrolment is another one."),
    ("Socket closed", "It hung up at once, as the port for devices does on callers without a certificate of the fleet."),
    ("unreachable", "There is no route to that address."),
    ("Timeout", "Nothing answered: a firewall, or no machine at that address."),
)


def reason_of(details: str) -> str:
    """gRPC's details of a failure as one short line."""
    line = ENVELOPE.sub("", " ".join(unquote(details).split())).rstrip(". ").removesuffix(": OK")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def meaning_of(details: str) -> str:
    """A sentence on what usually brings such a failure about; empty where there is none."""
    return next((meaning for part, meaning in MEANINGS if part in details), "")


def is_tls(details: str) -> bool:
    """Whether the two sides met and did not agree on TLS."""
    return any(part in details for part in TLS)
