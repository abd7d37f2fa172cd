"""GPU memory and streams for TensorRT, by the CUDA driver's own library.

`libcuda.so.1` comes with the driver, so nothing is installed for it, and its names are those of CUDA 4. The other ways
were `cuda-python` (a package for each CUDA version, and none in JetPack) and `libcudart` (another file name for each version).
TensorRT uses the device's primary context, and so do we.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError

__all__ = ["Cuda", "DriverCuda", "gpu_present"]

LIBRARY = "libcuda.so.1"
DEVICE = 0
HANDLE = ctypes.c_void_p
POINTER = ctypes.c_uint64  # CUdeviceptr
# what each function takes; all of them return a CUresult, 0 when all is well
FUNCTIONS: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGetCount": [ctypes.POINTER(ctypes.c_int)],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDeviceGetName": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(HANDLE), ctypes.c_int],
    "cuCtxSetCurrent": [HANDLE],
    "cuStreamCreate": [ctypes.POINTER(HANDLE), ctypes.c_uint],
    "cuStreamSynchronize": [HANDLE],
    "cuStreamDestroy_v2": [HANDLE],
    "cuMemAlloc_v2": [ctypes.POINTER(POINTER), ctypes.c_size_t],
    "cuMemFree_v2": [POINTER],
    "cuMemcpyHtoDAsync_v2": [POINTER, ctypes.c_void_p, ctypes.c_size_t, HANDLE],
    "cuMemcpyDtoHAsync_v2": [ctypes.c_void_p, POINTER, ctypes.c_size_t, HANDLE],
}


class Cuda(Protocol):
    """Attributes:
    name: of the GPU, as its driver calls it.
    """

    name: str

    def enter(self) -> None:
        """Makes the GPU current for the calling thread."""

    def stream(self) -> int: ...
    def allocate(self, size: int) -> int: ...
    def upload(self, address: int, source: NDArray[np.float32], stream: int) -> None: ...
    def download(self, target: NDArray[np.float32], address: int, stream: int) -> None: ...
    def synchronise(self, stream: int) -> None: ...
    def release(self, stream: int, addresses: tuple[int, ...]) -> None: ...


def _library() -> Any:
    return ctypes.CDLL(LIBRARY)


@functools.cache
def gpu_present() -> bool:
    """Whether the driver is there and sees a GPU."""
    count = ctypes.c_int(0)
    try:
        library = _library()
        return bool(library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0)
    except (OSError, AttributeError):
        return False


class DriverCuda:
    """The first GPU.

    Args:
        library: the driver's; None: looked for.

    Raises:
        BundleError: there is no driver or no GPU, or it has no memory left.
    """

    def __init__(self, library: Any = None) -> None:
        try:
            self._library = library if library is not None else _library()
            for function, takes in FUNCTIONS.items():
                getattr(self._library, function).argtypes = takes
        except (OSError, AttributeError) as e:
            raise BundleError(
                f"This target needs an NVIDIA GPU, and its driver ({LIBRARY}) is not installed here.",
                code="no-gpu",
                detail=str(e),
            ) from e
        device, name, context = ctypes.c_int(0), ctypes.create_string_buffer(256), HANDLE()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), DEVICE)
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self.name = name.value.decode("utf-8", "replace")

    def _call(self, function: str, *given: Any) -> None:
        result = getattr(self._library, function)(*given)
        if result:
            raise BundleError(
                f"The GPU's driver refuses {function} (CUDA error {result}): is the GPU there, and is its memory free?",
                code="no-gpu" if function in ("cuInit", "cuDeviceGet") else "gpu",
            )

    def enter(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def stream(self) -> int:
        made = HANDLE()
        self._call("cuStreamCreate", ctypes.byref(made), 1)  # CU_STREAM_NON_BLOCKING: no engine waits for another
        return int(made.value or 0)

    def allocate(self, size: int) -> int:
        made = POINTER()
        self._call("cuMemAlloc_v2", ctypes.byref(made), size)
        return int(made.value)

    def upload(self, address: int, source: NDArray[np.float32], stream: int) -> None:
        self._call("cuMemcpyHtoDAsync_v2", POINTER(address), source.ctypes.data, source.nbytes, HANDLE(stream))

    def download(self, target: NDArray[np.float32], address: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", target.ctypes.data, POINTER(address), target.nbytes, HANDLE(stream))

    def synchronise(self, stream: int) -> None:
        self._call("cuStreamSynchronize", HANDLE(stream))

    def release(self, stream: int, addresses: tuple[int, ...]) -> None:
        self.enter()
        self._call("cuStreamDestroy_v2", HANDLE(stream))
        for address in addresses:
            self._call("cuMemFree_v2", POINTER(address))
