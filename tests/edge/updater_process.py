"""A device's updater in a process of its own, to be killed: python updater_process.py FOLDER FLOW STEP NTH

Does what FLOW says and kills itself with SIGKILL when STEP is reached for the NTH time. With STEP "disk-full" it forbids its
files to grow before the update instead, with "disk-full-commit" between applying and committing, and prints what came of it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

from tiny_bundle import COHORT

from edge.updater import Updater
from refold import Bundle, Release
from refold.errors import RefoldError
from refold.signing import KeyRing
from refold.v1 import adaptation_pb2, norms_pb2


def main(folder: Path, flow: str, step: str, nth: int) -> None:
    applied: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    seen = 0

    def at(name: str) -> None:
        nonlocal seen
        if step == "disk-full-commit" and name == "applied":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        seen += name == step
        if name == step and seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def apply(release: Release | None) -> None:
        if step == "in-apply" and release is not None and release.version == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        applied.append(release.version if release else 0)

    def canary(release: Release) -> None:
        if step == "in-canary" and release.version == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    ring = KeyRing([(folder / "key").read_bytes()])
    updater = Updater(folder / "state", Bundle.open(folder / "m.refold"), ring, apply, cohort=COHORT, canary=canary, at=at)
    updater.start()
    if step == "disk-full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    outcome = None
    try:
        if flow == "exported":
            outcome = updater.follow(adaptation_pb2.PollReleaseResponse(use_exported=True))
        elif flow == "revert":
            updater.revert("a test says so")
        else:
            signed = norms_pb2.SignedRelease.FromString((folder / flow).read_bytes())
            outcome = updater.follow(adaptation_pb2.PollReleaseResponse(release=signed))
        said = f"{outcome.result.value} {outcome.error.exit_code if outcome.error else 0}" if outcome else "reverted 0"
    except RefoldError as e:
        said = f"raised {e.exit_code}"
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print(said, updater.version, applied[-1])  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
