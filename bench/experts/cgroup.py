"""A memory cap that the kernel enforces: a control group of our own, removed afterwards.

Version 1 (`/sys/fs/cgroup/memory`) and version 2 (`memory.max`). Both charge anonymous memory and the page cache of whoever
reads first; over the limit the kernel takes cache back, then kills. A process is put in before it becomes the engine, so that
nothing of it escapes. Where groups may not be made, `Caps.reason` says why and rows with caps are left out.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Caps", "Finished", "Group", "cap_bytes"]

UNLIMITED = 1 << 62
V1 = {"limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes", "now": "memory.usage_in_bytes"}
V2 = {"limit": "memory.max", "peak": "memory.peak", "now": "memory.current"}
ENTER = 'echo $$ > "$0" && exec "$@"'


def cap_bytes(share: float, experts: int, own: int, allowance: int) -> int:
    """The cap of an engine: `share` of all experts' bytes, what it needs besides experts, and the allowance; whole pages."""
    return -(-(int(share * experts) + own + allowance) // 4096) * 4096


@dataclass(frozen=True)
class Finished:
    """How a process in a group ended. Bytes: `peak` of everything charged; `anonymous`: most seen, sampled each 20 ms."""

    code: int
    output: str
    errors: str
    peak: int
    anonymous: int
    killed: int


@dataclass
class Group:
    """One control group. `limit` in bytes; None: none."""

    path: Path
    names: Mapping[str, str]

    @property
    def procs(self) -> Path:
        return self.path / "cgroup.procs"

    def limit(self, size: int | None) -> None:
        self._write("limit", str(size) if size is not None else ("-1" if self.names is V1 else "max"))
        swap = self.path / ("memory.memsw.limit_in_bytes" if self.names is V1 else "memory.swap.max")
        if size is not None and swap.exists():
            try:
                swap.write_text(str(size) if self.names is V1 else "0")
            except OSError:
                pass  # a kernel without swap accounting: this machine is told to have none in the result

    def read(self, name: str) -> int:
        try:
            told = (self.path / self.names[name]).read_text().strip()
        except OSError:  # memory.peak came with Linux 5.19
            return 0
        return UNLIMITED if told == "max" else int(told)

    def anonymous(self) -> int:
        return _field(self.path / "memory.stat", "rss" if self.names is V1 else "anon")

    def killed(self) -> int:
        return _field(self.path / ("memory.oom_control" if self.names is V1 else "memory.events"), "oom_kill")

    def run(self, command: Sequence[str], environment: Mapping[str, str], timeout: float) -> Finished:
        """The command, in this group from its first instruction."""
        before = self.killed()
        process = subprocess.Popen(
            ["/bin/sh", "-c", ENTER, str(self.procs), *command], env=dict(environment), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        most, done = [0, 0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                most[0], most[1] = max(most[0], self.anonymous()), max(most[1], self.read("now"))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            errors += f"\nended after {timeout:.0f} s"
        except BaseException:  # interrupted: nothing may stay in a group that is to go
            process.kill()
            process.wait()
            raise
        finally:
            done.set()
            watcher.join()
        peak = self.read("peak") or most[1]
        return Finished(process.returncode, output, errors, peak, most[0], self.killed() - before)

    def _write(self, name: str, value: str) -> None:
        (self.path / self.names[name]).write_text(value)


@dataclass
class Caps:
    """Where groups can be made. `reason`: why not; empty when they can."""

    root: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def find(cls, base: Path = Path("/sys/fs/cgroup")) -> Caps:
        reasons = []
        for root, names in ((base / "memory", V1), (base, V2)):
            if not (root / "cgroup.procs").exists():
                continue
            if names is V2 and "memory" not in (root / "cgroup.subtree_control").read_text().split():
                reasons.append(f"{root} does not give its children the memory controller")
                continue
            found = cls(root, names)
            try:
                with found.group() as group:
                    group.limit(64 << 20)
            except OSError as e:
                reasons.append(f"{root}: {e.strerror}")
                continue
            return found
        return cls(reason="; ".join(reasons) or f"no memory control group under {base}")

    @contextmanager
    def group(self) -> Iterator[Group]:
        """A new group, removed at the end even when its processes were killed."""
        assert self.root is not None, self.reason
        path = self.root / f"refold-bench-{os.getpid()}-{time.monotonic_ns()}"
        path.mkdir()
        try:
            yield Group(path, self.names)
        finally:
            _remove(path)


def _remove(path: Path) -> None:
    for _ in range(100):
        try:
            path.rmdir()
            return
        except OSError:  # its last process is still going
            time.sleep(0.05)
    path.rmdir()


def _field(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except OSError:
        pass
    return 0
