"""Operators: certificates made, renewed and revoked on the server's disk, and looked up at every call.

Making one needs the authority's key, so it is done where that lies; nobody can lock himself out for good. A certificate that is
revoked is refused from the next call on, on connections that are open as well. The role is a column of its own; today there is
one, and it may do everything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from cloud.enrol import COHORT
from cloud.identity import Authority, Peer, peer_of, write_private
from cloud.store import OperatorRecord
from cloud.store.operators import OperatorRows, is_valid
from refold.atomic import make_directory, write_atomically
from refold.errors import AccessError, StorageError, UsageError

__all__ = ["Operators", "Pair", "adopt_file", "expiry_warnings", "issue", "pair_of", "renew"]

ROLE = "operator"
SOON_DAYS = 30.0  # of a certificate's end: enough to notice it in a status that is looked at once a month
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Pair:
    """Where an operator's certificate and key lie."""

    certificate: Path
    key: Path


def record_of(pem: bytes) -> OperatorRecord:
    """Raises AccessError when the certificate is not an operator's."""
    peer = peer_of(pem)
    if peer.role != ROLE:
        raise AccessError(f"The certificate of {peer.id} is a {peer.role}'s, not an operator's.", code="wrong-role")
    return OperatorRecord(peer.serial, peer.id, ROLE, int(time.time() * 1000), peer.expires_ms)


class Operators:
    """Says who may call Admin."""

    def __init__(self, rows: OperatorRows) -> None:
        self._rows = rows

    def admit(self, peer: Peer) -> OperatorRecord:
        """The operator behind a certificate, which the TLS handshake and `cloud.rpc` have found genuine and not expired.

        One of a fleet from before there were rows is recorded at its first call.

        Raises:
            AccessError: it was revoked, or replaced by certificates that were issued since.
        """
        record = self._rows.get(peer.serial)
        if record is None:
            now = int(time.time() * 1000)
            record = self._rows.adopt(OperatorRecord(peer.serial, peer.id, ROLE, now, peer.expires_ms))
        if record is None:
            raise AccessError(
                f"This certificate of operator {peer.id} is not one that was issued here: use the newer one.",
                code="unknown-operator",
            )
        if record.revoked_ms:
            raise AccessError(
                f"This certificate of operator {peer.id} was revoked: another operator can issue a new one "
                "(`refold cloud operator issue`).",
                code="revoked",
            )
        return record

    def warnings(self) -> list[str]:
        """A sentence for each operator who is about to lose, or has lost, the right to call."""
        return expiry_warnings(self._rows.all(), int(time.time() * 1000))


def expiry_warnings(records: Sequence[OperatorRecord], now_ms: int) -> list[str]:
    """Pure: of each operator only the certificate that lasts longest counts, and none that was revoked."""
    newest: dict[str, int] = {}
    for record in records:
        if not record.revoked_ms:
            newest[record.name] = max(newest.get(record.name, 0), record.expires_ms)
    return [
        f"The certificate of operator {name} {_when(expires, now_ms)}: `refold cloud operator renew {name}` on the server."
        for name, expires in sorted(newest.items())
        if expires < now_ms + SOON_DAYS * DAY_MS
    ]


def _when(expires_ms: int, now_ms: int) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(expires_ms / 1000))
    if expires_ms <= now_ms:
        return f"expired on {day}"
    return f"expires on {day}, in {(expires_ms - now_ms) / DAY_MS:.0f} days"


def adopt_file(rows: OperatorRows, certificate: Path, authority: Authority) -> None:
    """Records the operator that `refold cloud init` made, unless its name is known; any other file is left alone."""
    try:
        pem = certificate.read_bytes()
        x509.load_pem_x509_certificate(pem).verify_directly_issued_by(x509.load_pem_x509_certificate(authority.pem))
        record = record_of(pem)
    except (OSError, ValueError, TypeError, InvalidSignature, AccessError):
        return
    rows.adopt(record)


def pair_of(folder: Path, name: str) -> Pair:
    """The files of an operator in a fleet's folder: below `operators/`, or `operator.pem`, which `init` made."""
    below = Pair(folder / "operators" / f"{name}.pem", folder / "operators" / f"{name}.key")
    first = Pair(folder / "operator.pem", folder / "operator.key")
    if not below.certificate.exists() and first.certificate.exists():
        try:
            if peer_of(first.certificate.read_bytes()).id == name:
                return first
        except (OSError, ValueError, AccessError):
            pass
    return below


def issue(rows: OperatorRows, authority: Authority, name: str, days: float, pair: Pair) -> OperatorRecord:
    """Makes an operator: a key and a certificate in two new files.

    Raises:
        UsageError: a name with other characters, one that is an operator already, no lifetime, or a file that is there.
        StorageError: the disk or the database does not take it.
    """
    _check(name, days)
    taken = next((p for p in (pair.key, pair.certificate) if p.exists()), None)
    if taken is not None:
        raise UsageError(f"{taken} exists; a private key is never overwritten. Move it away first.", code="exists")
    pem, key = authority.issue_operator(name, days)
    record = record_of(pem)
    _folder(pair.certificate.parent)
    write_private(pair.key, key)
    try:
        write_atomically(pair.certificate, [pem])
        rows.add(record, first=True)
    except BaseException:
        for path in (pair.certificate, pair.key):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return record


def renew(rows: OperatorRows, authority: Authority, name: str, days: float, pair: Pair, *, replace: bool) -> OperatorRecord:
    """A new key and certificate in place of the old ones, also after those expired.

    Killed in between, the two files may not belong together: running it again mends that.

    Args:
        replace: the earlier certificates are refused from now on; else they are good until they expire.

    Raises:
        UsageError: there is no such operator, or it was revoked.
        StorageError: the disk or the database does not take it; the old certificate is as good as before.
    """
    _check(name, days)
    pem, key = authority.issue_operator(name, days)
    record = record_of(pem)
    rows.add(record, first=False)
    _folder(pair.certificate.parent)
    write_atomically(pair.key, [key], mode=0o600)
    write_atomically(pair.certificate, [pem])
    if replace:
        rows.replace(name, record.serial)
    return record


def _check(name: str, days: float) -> None:
    if not COHORT.fullmatch(name):
        raise UsageError(f"{name!r} is not an operator's name: letters, digits, '.', '-' and '_', at most 64.")
    if not 0 < days <= 3650:
        raise UsageError(f"A certificate lasts more than 0 and at most 3,650 days, not {days:g}.")


def _folder(folder: Path) -> None:
    try:
        make_directory(folder, mode=0o700)
    except OSError as e:
        raise StorageError(f"{folder} cannot be made: {e.strerror or e}.") from e


def state_of(record: OperatorRecord, now_ms: int) -> str:
    """For people and machines: "valid", "expired" or "revoked"."""
    if is_valid(record, now_ms):
        return "valid"
    return "revoked" if record.revoked_ms else "expired"
