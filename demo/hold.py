"""`python -m demo.hold GROUP`: stops a process group for as long as this program's standard input stays open.

A program of its own, so that a demo that is killed outright cannot leave a stopped process behind: its end of the pipe closes.
"""

from __future__ import annotations

import os
import signal
import sys

__all__: list[str] = []


def main() -> None:
    group = int(sys.argv[1])
    try:
        os.killpg(group, signal.SIGSTOP)
        sys.stdin.buffer.read()
    finally:
        os.killpg(group, signal.SIGCONT)


if __name__ == "__main__":
    try:
        main()
    except ProcessLookupError:  # it has ended meanwhile
        sys.exit(0)
