"""GPU memory through the driver's own library, against a double of it."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from edge.engine import cuda as cuda_module
from refold.errors import BundleError


class Driver:
    """libcuda with one GPU and `room` bytes, in host memory."""

    def __init__(self, room: int = 1 << 20, refuses: str = "") -> None:
        self.room, self.refuses, self.held = room, refuses, {}
        for name in cuda_module.FUNCTIONS:
            setattr(self, name, _Function(self, name))

    def call(self, name, given):
        if name == self.refuses:
            return 999
        if name == "cuDeviceGetName":
            given[0].value = b"Orin"
        elif name == "cuDeviceGetCount":
            given[0]._obj.value = 1
        elif name in ("cuStreamCreate", "cuDevicePrimaryCtxRetain"):
            given[0]._obj.value = 77
        elif name == "cuMemAlloc_v2":
            if given[1] > self.room:
                return 2
            block = ctypes.create_string_buffer(given[1])
            given[0]._obj.value = ctypes.addressof(block)
            self.held[ctypes.addressof(block)] = block
        elif name == "cuMemFree_v2":
            del self.held[given[0].value]
        elif name == "cuMemcpyHtoDAsync_v2":
            ctypes.memmove(given[0].value, given[1], given[2])
        elif name == "cuMemcpyDtoHAsync_v2":
            ctypes.memmove(given[0], given[1].value, given[2])
        return 0


class _Function:
    def __init__(self, driver, name):
        self.driver, self.name, self.argtypes = driver, name, []

    def __call__(self, *given):
        return self.driver.call(self.name, given)


def test_memory_of_the_gpu_by_its_driver():
    driver = Driver()
    gpu = cuda_module.DriverCuda(driver)
    assert gpu.name == "Orin"
    gpu.enter()
    stream, address = gpu.stream(), gpu.allocate(40)
    there, back = np.arange(10, dtype=np.float32), np.zeros(10, np.float32)
    gpu.upload(address, there, stream)
    gpu.download(back, address, stream)
    gpu.synchronise(stream)
    assert np.array_equal(there, back)
    with pytest.raises(BundleError, match=r"cuMemAlloc_v2 \(CUDA error 2\)"):
        gpu.allocate(1 << 30)
    gpu.release(stream, (address,))
    assert not driver.held
    with pytest.raises(BundleError, match="cuInit") as said:
        cuda_module.DriverCuda(Driver(refuses="cuInit"))
    assert said.value.code == "no-gpu"


def test_whether_a_gpu_is_there(monkeypatch):
    for library, there in ((Driver(), True), (Driver(refuses="cuInit"), False), (None, False)):
        cuda_module.gpu_present.cache_clear()

        def load(library=library):
            if library is None:
                raise OSError("no such library")
            return library

        monkeypatch.setattr(cuda_module, "_library", load)
        assert cuda_module.gpu_present() is there
    with pytest.raises(BundleError, match=r"its driver .* is not installed here"):
        cuda_module.DriverCuda()
    cuda_module.gpu_present.cache_clear()


# A real one ------------------------------------------------------------------------------------------------------------------
