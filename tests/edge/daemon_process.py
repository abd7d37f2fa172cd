"""`refold edge run` as a real process, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edge.runtime.status_socket import ask


class DaemonProcess:
    """Started at once; ended, however, when the `with` block ends.

    Args:
        beside: where predictions and log go; the data directory is then left to the daemon.
    """

    def __init__(self, *arguments: object, data: Path, beside: Path | None = None, **environment: str) -> None:
        self.data = data
        self._beside = beside or data
        self.predictions = self._beside / "predictions.jsonl"
        self._beside.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "refold.cli", "edge", "run", "--data", data, "--predictions", self.predictions]
        self.log = (self._beside / "log.txt").open("ab+")
        self.process = subprocess.Popen(
            [str(c) for c in (*command, *arguments)],
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={
                **os.environ,
                "REFOLD_EDGE_METRICS__STATUS_S": "0.1",
                "OMP_NUM_THREADS": "1",
                "PYTHONFAULTHANDLER": "1",
                **environment,
            },
            text=True,
        )

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.log.close()

    def lines(self) -> list[dict[str, Any]]:
        try:
            text = self.predictions.read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.split("\n")[:-1]]  # the last line may be half written

    def version(self) -> int | None:
        """Release version behind the newest prediction; None before the first."""
        lines = self.lines()
        return int(lines[-1]["release_version"]) if lines else None

    def status(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.data / "status.json").read_text()))
        except FileNotFoundError:
            return {}

    def asked(self) -> dict[str, Any]:
        """The status as the process itself tells it, whatever its disk does; empty before it can."""
        return ask(self.data) or {}

    def said(self) -> str:
        return (self._beside / "log.txt").read_text()

    def until(self, true: Any, seconds: float = 60.0) -> None:
        """Waits for something the daemon will do; fails with its log when it ends first or does not."""
        end = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def until_said(self, words: str, seconds: float = 60.0) -> None:
        """Waits for words in its log, whether it still runs or not."""
        end = time.monotonic() + seconds
        while words not in self.said():
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code. One that does not end is asked where every thread stands, and fails with that."""
        try:
            self.output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # PYTHONFAULTHANDLER prints the stacks
            self.process.communicate(timeout=10)
            raise AssertionError(f"It did not end in {seconds:.0f} s:\n{self.said()}") from None
        return self.process.returncode
