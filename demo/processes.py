"""The demo's processes: started with their output in a file, watched, and gone when the demo is, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from cloud.settings import PREFIX as CLOUD_PREFIX
from demo.report import Life
from edge.settings import PREFIX as EDGE_PREFIX
from refold.append import open_append
from refold.errors import NetworkError, RefoldError, StorageError

__all__ = ["Hold", "Process", "Processes", "default_environment", "free_port", "refold_command"]

PATIENCE_SECONDS = 10.0  # from SIGTERM to SIGKILL


def refold_command(*arguments: str) -> list[str]:
    """This very installation's `refold`, whatever PATH says."""
    return [sys.executable, "-m", "refold.cli", *arguments]


def default_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without settings of the product (REFOLD_EDGE_..., REFOLD_CLOUD_...), and with output that is not buffered."""
    kept = {name: value for name, value in environ.items() if not name.startswith((CLOUD_PREFIX, EDGE_PREFIX))}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A loopback port nobody listens on now.

    Raises:
        NetworkError: the machine has no loopback interface or no port left.
    """
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return int(s.getsockname()[1])
    except OSError as e:
        raise NetworkError(f"No free port on 127.0.0.1 ({e.strerror}): the demo needs the loopback interface.") from e


class Process:
    """A running command. `log`: where its output goes."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.log = name, log
        self.began = time.monotonic()
        self._popen = popen
        self._ended = 0.0

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit(self) -> int | None:
        """Its exit status, None while it runs."""
        status = self._popen.poll()
        if status is not None and not self._ended:
            self._ended = time.monotonic()
        return status

    def life(self, origin: float) -> Life:
        """For the report; `origin` is the monotonic time of second 0."""
        status = self.exit
        end = self._ended or time.monotonic()
        return Life(self.name, self.pid, round(self.began - origin, 2), round(end - self.began, 2), status)

    def tail(self, lines: int = 4) -> str:
        """The last lines of its output, for an error's sentence."""
        try:
            text = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return " | ".join(text[-lines:])

    def signal(self, number: int) -> None:
        if self.exit is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> None:
        """Lets it end by itself for so long."""
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pass

    def stop(self, patience: float = PATIENCE_SECONDS) -> int:
        """SIGTERM, then SIGKILL after `patience` seconds; returns the exit status."""
        if self.exit is None:
            self._popen.send_signal(signal.SIGCONT)
            self._popen.terminate()
            try:
                self._popen.wait(patience)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._end_group()
        return self.exit or 0

    def _end_group(self) -> None:
        """Ends what the process itself had started and left behind."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def must_run(self) -> None:
        """Raises RefoldError with the last lines of its output when it has ended by itself."""
        if self.exit is not None:
            raise RefoldError(
                f"The {self.name} process ended by itself (exit {self.exit}): {self.tail() or 'no output'}. See {self.log}.",
                code="process-ended",
            )


class Hold:
    """A process and all it started, standing still until `release`."""

    def __init__(self, process: Process) -> None:
        command = [sys.executable, "-m", "demo.hold", str(process.pid)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def release(self) -> None:
        if self._popen.stdin is not None and not self._popen.stdin.closed:
            self._popen.stdin.close()
            self._popen.wait()


class Processes:
    """Context manager: whatever was started in it has ended when it is left, and so has what that started.

    Each process leads a session of its own, so that Ctrl-C reaches only the demo. Start from the main thread (see demo.leash).
    None gets a setting of the product from the environment (`default_environment`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin = time.monotonic()
        self.all: list[Process] = []
        self._holds: list[Hold] = []
        self._environment = default_environment(os.environ)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hold in self._holds:
            hold.release()
        for process in reversed(self.all):
            process.stop()

    def hold(self, process: Process) -> Hold:
        """Stops a process as an outage would; released at the latest when the demo ends, however it ends."""
        self._holds.append(Hold(process))
        return self._holds[-1]

    def start(self, name: str, command: Sequence[str]) -> Process:
        """Starts a command that dies with this process, its stdout and stderr in `<folder>/<name>.log`."""
        log = self.folder / f"{name}.log"
        leashed = [sys.executable, "-m", "demo.leash", str(os.getpid()), *command]
        try:
            with open_append(log, json_lines=False) as out:
                popen = subprocess.Popen(
                    leashed,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
        except OSError as e:
            raise StorageError(f"{name} cannot be started: {e.strerror} ({e.filename or log}).") from e
        process = Process(name, popen, log)
        self.all.append(process)
        return process

    def run(self, name: str, command: Sequence[str], timeout: float, tick: Callable[[], None] | None = None) -> str:
        """Runs a command to its end and returns its stdout.

        Raises:
            RefoldError: it failed or took longer than `timeout` seconds; the sentence has its last line.
        """
        process = Process(name, self._popen_captured(name, command), self.folder / f"{name}.log")
        self.all.append(process)
        give_up = time.monotonic() + timeout
        while process.exit is None:
            if time.monotonic() > give_up:
                process.stop()
                raise RefoldError(f"{name} took longer than {timeout:.0f} s; see {process.log}.", code="process-slow")
            if tick:
                tick()
            time.sleep(0.05)
        output = (self.folder / f"{name}.out").read_text(errors="replace")
        if process.exit:
            reason = process.tail(1) or output.strip()[-300:]
            raise RefoldError(f"{name} failed (exit {process.exit}): {reason}", code="process-failed")
        return output

    def _popen_captured(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        leashed = [sys.executable, "-m", "demo.leash", str(os.getpid()), *command]
        try:
            with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.log").open("wb") as log:
                return subprocess.Popen(
                    leashed, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=self._environment, start_new_session=True
                )
        except OSError as e:
            raise StorageError(f"{name} cannot be started: {e.strerror} ({e.filename}).") from e
