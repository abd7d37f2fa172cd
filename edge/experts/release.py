"""Releases of a language model: the gains of its RMS norms, trusted exactly as a release of a vision bundle is.

    given(file, bundle, trust)      `--release FILE` of one run: signature, bundle, cohort, admission; nothing is remembered
    Live(bundle, trust, data, put)  of a server: the device's updater, with its memory, and gains exchanged while it runs
    of_gains(bundle, gains, ...)    makes one from gains that were trained elsewhere

What is believed is decided in edge/trust.py and kept by edge/updater.py; this file says where a language model's norms are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from edge.directory import DataDirectory
from edge.enrol import Identity
from edge.releases import ENVELOPE_BYTES
from edge.trust import Home, Memory, examine
from edge.updater import Outcome, Updater
from refold.bundle import Bundle
from refold.errors import NormStateError, ReleaseError, UsageError
from refold.limits import LIMITS
from refold.norms import NormState
from refold.release import Release, admit
from refold.signing import KeyRing
from refold.v1 import norms_pb2 as pb

__all__ = ["LARGEST", "Live", "Trust", "gains_of", "given", "of_gains", "parse", "read", "trust"]

F32 = NDArray[np.float32]
LARGEST = LIMITS.release_bytes + ENVELOPE_BYTES


@dataclass(frozen=True)
class Trust:
    """Whose releases are believed. Attributes: `fleet` names the fleet; another one counts its versions anew."""

    ring: KeyRing
    cohort: str
    fleet: bytes = b""


def trust(data: Path, keys: Sequence[str] = (), cohort: str = "") -> Trust:
    """From keys on the command line, else from what enrolment left in `<data>/identity`.

    Args:
        keys: public keys, 64 hex digits each.

    Raises:
        UsageError: neither keys nor an identity, or a key that is none.
    """
    if cohort and not keys:
        raise UsageError("A cohort goes with --key; an enrolled device's cohort is that of its identity.")
    if not keys:
        identity = Identity.load(data / "identity")
        return Trust(identity.ring, identity.cohort, identity.ca_pem)
    try:
        return Trust(KeyRing(bytes.fromhex(k) for k in keys), cohort)
    except ValueError:
        raise UsageError("A release key is 64 hex digits, as `release.pub` of the fleet holds them.") from None


def parse(content: bytes) -> pb.SignedRelease:
    """Raises ReleaseError: too large, or no signed release."""
    if len(content) > LARGEST:
        raise ReleaseError(f"The release has over {LARGEST} bytes: refused unread.", code="release-too-large")
    try:
        return pb.SignedRelease.FromString(content)
    except DecodeError as e:
        raise ReleaseError("This is no signed release, or it was damaged on its way.", code="damaged") from e


def read(path: Path) -> pb.SignedRelease:
    """Raises UsageError: the file cannot be read. ReleaseError: see `parse`."""
    try:
        with path.open("rb") as f:
            return parse(f.read(LARGEST + 1))
    except OSError as e:
        raise UsageError(f"The release {path} cannot be read: {e.strerror or e}.") from e


def given(path: Path, bundle: Bundle, who: Trust) -> Release:
    """A release that a person named for one run.

    Raises:
        SignatureError, ReleaseError, NormStateError: as `edge.trust.examine`.
        UsageError: the file cannot be read.
    """
    home = Home(bundle.digest, who.cohort, bundle.norms, who.ring)
    return examine(read(path), home, Memory(), ordered=True, now_unix_ms=time.time_ns() // 1_000_000)


def gains_of(bundle: Bundle, release: Release | None) -> dict[str, F32]:
    """Every gain of the bundle, and offset where a norm has one, by the name of its parameter; float32 (channels,).

    A site that the release leaves out is as exported.
    """
    tensors = bundle.norms.tensors(release.states if release else {})
    return {name: np.asarray(values, np.float32) for name, values in tensors.items()}


def of_gains(
    bundle: Bundle, gains: Mapping[str, F32], *, cohort: str, version: int, note: str = "", expires_unix_ms: int = 0
) -> Release:
    """A release from gains trained elsewhere; `refold.release.seal(it, key)` signs it.

    Args:
        gains: float (channels,) by the name of the parameter in transformers' state dict; what is left out stays as exported.

    Raises:
        NormStateError: a name the bundle has no site for, another shape, or outside the trust region.
        ReleaseError: a version below 1.
    """
    exported = {name: bundle.norms.site(name).exported for name in gains}
    states = {name: NormState(np.asarray(gain, np.float32), exported[name].beta) for name, gain in gains.items()}
    now = time.time_ns() // 1_000_000
    made = Release(
        bundle.digest, cohort, version, states, created_unix_ms=now, expires_unix_ms=expires_unix_ms, note=note
    )  # fmt: skip
    admit(made, bundle.norms, bundle_digest=bundle.digest, cohort=cohort, now_unix_ms=now)
    return made


class Live:
    """Keeps one release in service while a model runs, across restarts. Thread-safe.

    Args:
        data: directory of the device; locked while this lives.
        put: takes gains into service; when it raises, the old ones still serve.

    Raises:
        UsageError: another process runs on `data`.
        StorageError: `data` cannot be used.
        NormStateError: the bundle has no norms to release.
    """

    def __init__(self, bundle: Bundle, who: Trust, data: Path, put: Callable[[Mapping[str, F32]], None]) -> None:
        if not bundle.norms.norms:
            raise NormStateError(f"{bundle.path} has no norm sites: there is nothing a release could change.", code="no-norm")
        directory = DataDirectory(data)
        with ExitStack() as stack:
            directory.lock()
            stack.callback(directory.unlock)
            self._updater = Updater(
                directory.updates,
                bundle,
                who.ring,
                lambda release: put(gains_of(bundle, release)),
                cohort=who.cohort,
                fleet=who.fleet,
            )
            stack.callback(self._updater.close)
            self._updater.start()
            self._open = stack.pop_all()

    @property
    def version(self) -> int:
        """Of the release in service; 0 as exported."""
        return self._updater.version

    def offer(self, content: bytes) -> Outcome:
        """Raises as `Updater.offer`; the release before still serves."""
        return self._updater.offer(parse(content))

    def close(self) -> None:
        self._open.close()
