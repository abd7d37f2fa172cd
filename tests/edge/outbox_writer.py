"""A process for the outbox tests to kill or starve: python outbox_writer.py PATH forever|full"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from samples_of import sample

from edge.outbox import Outbox
from refold.errors import StorageError


def main(path: Path, mode: str) -> None:
    if mode == "forever":
        box = Outbox(path)
        for i in range(10**6):
            box.put(*sample(i, score=float(i % 7)))
            print(i, flush=True)  # noqa: T201
    box = Outbox(path)
    for i in range(20):
        box.put(*sample(i, size=9000))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    size = max(f.stat().st_size for f in path.parent.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300_000, hard))
    put = 20
    try:
        while put < 10_000:
            box.put(*sample(put, size=9000))
            put += 1
    except StorageError as e:
        print(e.exit_code, put, len(box), flush=True)  # noqa: T201
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    box.put(*sample(put, size=9000))
    print(len(box), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
