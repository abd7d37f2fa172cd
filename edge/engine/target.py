"""Which of a bundle's targets this machine runs, and whether their runtime is installed."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.util import find_spec
from pathlib import Path

from edge.engine.cuda import gpu_present
from edge.engine.trt_api import load_tensorrt, tensorrt_installed
from refold.bundle import Bundle
from refold.errors import BundleError

__all__ = ["architecture", "choose_target", "processor", "require", "runtime_name"]

ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "i686": "x86", "aarch64": "arm64", "arm64": "arm64", "armv7l": "arm32"}
# runtime → (module, what to install); the first that suits is taken. TensorRT stands last until a GPU has measured it (ADR 010)
RUNTIMES = {
    "ort": ("onnxruntime", "onnxruntime"),
    "litert": ("ai_edge_litert", "refold[litert]"),
    "tensorrt": ("tensorrt", "tensorrt-cu12"),
}
FEATURES = {"avx2": ("avx2",), "vnni": ("avx512_vnni", "avx_vnni"), "neon": ("asimd", "neon"), "dotprod": ("asimddp",)}


def architecture() -> str:
    """x86, arm64, arm32, or the operating system's own word."""
    machine = platform.machine().lower()
    return ARCHITECTURES.get(machine, machine)


@functools.cache
def _features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    told = [line.split(":", 1)[1] for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(word for words in told for word in words.split())


def processor() -> str:
    """A short digest of architecture and instruction sets: graphs optimised for one processor are not another's."""
    return hashlib.sha256(" ".join([architecture(), *sorted(_features())]).encode()).hexdigest()[:12]


def runtime_name(target: str) -> str:
    """The runtime a target's name begins with."""
    return target.partition("-")[0]


def _installed(runtime: str) -> bool:
    return tensorrt_installed() if runtime == "tensorrt" else find_spec(RUNTIMES[runtime][0]) is not None


def require(target: str) -> None:
    """Raises BundleError when this version does not know the target's runtime, or its package is not installed."""
    runtime = runtime_name(target)
    if runtime not in RUNTIMES:
        raise BundleError(f"Target {target} is for a runtime this version does not know: update Refold.", code="no-runtime")
    if runtime == "tensorrt" and _installed(runtime) and not gpu_present():
        raise BundleError(f"Target {target} needs an NVIDIA GPU, and none is here. Name another target.", code="no-gpu")
    if not _installed(runtime):
        if runtime == "tensorrt":
            load_tensorrt()
        module, package = RUNTIMES[runtime]
        raise BundleError(
            f"Target {target} needs {module}, which is not installed: pip install '{package}'.", code="no-runtime"
        )


def _suits(name: str, runtime: str) -> bool:
    """Target names are runtime-architecture-instruction set, e.g. ort-x86-vnni; a runtime alone runs anywhere."""
    first, _, rest = name.partition("-")
    where, _, feature = rest.partition("-")
    wanted = FEATURES.get(feature, ())
    if runtime == "tensorrt" and not (_installed(runtime) and gpu_present()):
        return False  # a file for a machine that may be elsewhere, not for this one
    return first == runtime and where in ("", "any", architecture()) and (not wanted or bool(_features().intersection(wanted)))


def choose_target(bundle: Bundle, name: str | None = None, *, runtime: str | None = None) -> str:
    """The target to run: the one asked for, else the fastest of the bundle's that suits this machine.

    ONNX Runtime's targets come first, LiteRT's where there are none or ONNX Runtime is not installed, TensorRT's where there is
    nothing else but the package and a GPU.

    Args:
        runtime: only targets of this one.

    Raises:
        BundleError: nothing suits, or the named target is absent or for another architecture.
    """
    have = [t.name for t in bundle.manifest.targets]
    if name is not None:
        bundle.target(name)
        _, _, rest = name.partition("-")
        where = rest.partition("-")[0]
        if where in set(ARCHITECTURES.values()) - {architecture()}:
            raise BundleError(
                f"Target {name} of {bundle.path} is for {where}, this machine is {architecture()}: "
                f"export the model for it (`refold export --target`).",
                code="no-target",
            )
        return name
    suited = [n for r in ([runtime] if runtime else RUNTIMES) for n in have if _suits(n, r)]
    if not suited:
        raise BundleError(
            f"{bundle.path} has no target for this machine ({architecture()}); it has: {', '.join(have) or 'none'}. "
            "Export the model for it (`refold export --target`).",
            code="no-target",
        )
    suited = [n for n in suited if _installed(runtime_name(n))] or suited
    best = [n for n in suited if runtime_name(n) == runtime_name(suited[0])]
    return ([n for n in best if n.endswith("-vnni")] or best)[0]
