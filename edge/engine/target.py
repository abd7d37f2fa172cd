"""Which of a bundle's targets this machine runs."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

from refold.bundle import Bundle
from refold.errors import BundleError

__all__ = ["architecture", "choose_target", "processor"]

ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "i686": "x86", "aarch64": "arm64", "arm64": "arm64", "armv7l": "arm32"}
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


def _suits(name: str, runtime: str) -> bool:
    """Target names are runtime-architecture-instruction set, e.g. ort-x86-vnni."""
    first, _, rest = name.partition("-")
    where, _, feature = rest.partition("-")
    wanted = FEATURES.get(feature, ())
    return first == runtime and where in ("", "any", architecture()) and (not wanted or bool(_features().intersection(wanted)))


def choose_target(bundle: Bundle, name: str | None = None, *, runtime: str = "ort") -> str:
    """The target to run: the one asked for, else the fastest of the bundle's that suits this processor.

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
    suited = [n for n in have if _suits(n, runtime)]
    if not suited:
        raise BundleError(
            f"{bundle.path} has no target for this machine ({architecture()}); it has: {', '.join(have) or 'none'}. "
            "Export the model for it (`refold export --target`).",
            code="no-target",
        )
    vnni = [n for n in suited if n.endswith("-vnni")]
    return (vnni or suited)[0]
