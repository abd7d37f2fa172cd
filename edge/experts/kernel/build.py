"""Compiles the native kernel when it is first needed, never at install, into a cache folder of the user's.

The file's name is a digest of the sources, the compiler, its flags and the processor's instruction sets: a new version, or a
home folder shared by different machines, never loads what was made for another. It appears by rename: two may build at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

__all__ = ["UnavailableError", "library"]

HERE = Path(__file__).resolve().parent
SOURCES = ("expert.c", "dot_avx2.h", "dot_neon.h", "dot_plain.h")
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
SECONDS = 120.0  # for one compilation; a Raspberry Pi needs about 15


class UnavailableError(Exception):
    """There is no native kernel on this machine; the text says why."""


def library() -> Path:
    """The compiled kernel's file, made now where it was not yet.

    Raises:
        UnavailableError: no C compiler (CC, cc, gcc or clang), it fails, or nowhere to put the file.
    """
    compiler = _compiler()
    version = _run([*compiler, "--version"]).splitlines()[0]
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native")
    told = hashlib.sha256(repr((compiler, version, flags, _processor())).encode())
    for source in SOURCES:
        told.update((HERE / source).read_bytes())
    folder = cache_folder()
    target = folder / f"expert-{told.hexdigest()[:24]}.so"
    if not _trusted(target):
        _compile([*compiler, *flags], folder, target)
    return target


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/refold/kernels, or ~/.cache/refold/kernels, of mode 700."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "refold" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as e:
        raise UnavailableError(f"there is no folder to keep it in ({e}). Set XDG_CACHE_HOME to one that can be written.") from e
    if not _own(folder):
        raise UnavailableError(f"others may write into {folder}, so nothing there is safe to load. Set its mode to 700.")
    return folder


def _own(path: Path) -> bool:
    """Of this user, and nobody else may change it."""
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _trusted(path: Path) -> bool:
    try:
        return path.stat().st_size > 0 and _own(path)
    except FileNotFoundError:
        return False


def _compile(command: list[str], folder: Path, target: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as scratch:
            made = Path(scratch) / target.name
            _run([*command, "-o", str(made), str(HERE / SOURCES[0]), "-lm"])
            made.chmod(0o700)
            made.replace(target)
    except OSError as e:
        raise UnavailableError(
            f"{folder} cannot be written ({e.strerror or e}). Set XDG_CACHE_HOME to a folder that can."
        ) from e


def _compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    for each in ("cc", "gcc", "clang"):
        if found := shutil.which(each):
            return [found]
    raise UnavailableError("there is no C compiler. Install gcc or clang, or go on with the slower torch kernel.")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UnavailableError(f"{command[0]} does not run: {e}") from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UnavailableError(f"{command[0]} ended with {done.returncode}: {last}")
    return done.stdout or "?"


def _processor() -> str:
    """Instruction sets, as Linux lists them; elsewhere the machine's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kept = {line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features", "CPU part")}
    return platform.machine() + "\n".join(sorted(kept))
