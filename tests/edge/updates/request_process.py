"""A device that obeys a rollback request, to be killed: python request_process.py FOLDER BUNDLE STEP

Starts, looks for the request and kills itself with SIGKILL when STEP of obeying it is done.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from refold import Bundle
from refold.signing import KeyRing


def main(folder: Path, bundle: Path, step: str) -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from machine_world import World

    world = World(folder, Bundle.open(bundle), KeyRing([(folder / "keys").read_bytes()])).boot()

    def kill(done: str) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    world.step = kill
    world.requests.look()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
