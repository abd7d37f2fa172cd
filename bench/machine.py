"""Which machine and which source made a result."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

__all__ = ["commit", "machine"]

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
PACKAGES = ("numpy", "onnx", "onnxruntime", "torch", "grpcio", "protobuf")


def machine() -> dict[str, object]:
    """Processor, its instruction sets that matter to integer networks, cores, memory, and the packages that did the work."""
    model, flags = _processor()
    return {
        "processor": model,
        "instructions": [f for f in INSTRUCTIONS if f in flags],
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_1min": round(psutil.getloadavg()[0], 2),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def commit() -> str:
    """The checkout's commit, with "+changes" when a tracked file of the programs differs from it; "" outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        paths = ["bench", "cloud", "edge", "export", "refold"]
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", *paths],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    changed = [line for line in status.stdout.splitlines() if "bench/results/" not in line]
    return head.stdout.strip() + ("+changes" if changed else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> tuple[str, set[str]]:
    """Model name and flags as /proc/cpuinfo tells them; what platform knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", platform.machine()), set((fields.get("flags") or fields.get("Features", "")).split())
