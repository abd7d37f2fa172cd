"""The part of the `tensorrt` package that Refold calls: exactly these names, so that a recording double can stand in for it.

TensorRT itself satisfies these protocols; there is no adapter between. Names and meanings are those of its Python API 8.6 to 11
(docs.nvidia.com/deeplearning/tensorrt). What differs between versions is asked of the package, never of its version number:

    STRONGLY_TYPED             since 10: types come from the file's Q and DQ, and no precision flags are given
    REFIT_INDIVIDUAL           since 10: with mark_weights_refittable; before, REFIT makes every weight exchangeable

TensorRT for RTX (the package `tensorrt_rtx`, GPUs of workstations) has the same API and is taken where the other is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError

__all__ = [
    "Config", "Context", "CudaEngine", "Network", "Parser", "PlanBuilder", "TensorRt", "WeightSetter", "load_tensorrt",
    "tensorrt_installed",
]  # fmt: skip

F32 = NDArray[np.float32]
PACKAGES = ("tensorrt", "tensorrt_rtx")
INSTALL = (
    "On a Jetson it comes with JetPack (apt install python3-libnvinfer, virtual environments with --system-site-packages); "
    "elsewhere pip install tensorrt-cu12, or tensorrt-rtx for an RTX GPU"
)


class Network(Protocol):
    """Its layers have `name` and `type`; one of type SCALE has `scale` and `shift` once its `__class__` is IScaleLayer."""

    num_layers: int

    def get_layer(self, index: int) -> Any: ...
    def set_weights_name(self, weights: Any, name: str) -> bool: ...
    def mark_weights_refittable(self, name: str) -> bool: ...


class Config(Protocol):
    def set_flag(self, flag: Any) -> None: ...
    def set_memory_pool_limit(self, pool: Any, size: int) -> None: ...


class Parser(Protocol):
    num_errors: int

    def parse(self, model: bytes) -> bool: ...
    def get_error(self, index: int) -> Any: ...


class Context(Protocol):
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def execute_async_v3(self, stream: int) -> bool: ...


class CudaEngine(Protocol):
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def create_execution_context(self) -> Context | None: ...


class WeightSetter(Protocol):
    """tensorrt.Refitter."""

    def get_all_weights(self) -> list[str]: ...
    def set_named_weights(self, name: str, weights: F32) -> bool: ...
    def get_missing_weights(self) -> list[str]: ...
    def refit_cuda_engine(self) -> bool: ...


class PlanBuilder(Protocol):
    """tensorrt.Builder."""

    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> Config: ...
    def build_serialized_network(self, network: Network, config: Config) -> Any: ...


class EngineReader(Protocol):
    """tensorrt.Runtime."""

    def deserialize_cuda_engine(self, plan: bytes) -> CudaEngine | None: ...


class TensorRt(Protocol):
    """The package."""

    __version__: str
    Logger: Any
    Builder: Callable[[Any], PlanBuilder]
    OnnxParser: Callable[[Network, Any], Parser]
    Runtime: Callable[[Any], EngineReader]
    Refitter: Callable[[CudaEngine, Any], WeightSetter]
    NetworkDefinitionCreationFlag: Any
    BuilderFlag: Any
    MemoryPoolType: Any
    LayerType: Any
    IScaleLayer: Any


def tensorrt_installed() -> bool:
    """Whether one of the packages is there; it may still be one that cannot build."""
    return any(find_spec(package) is not None for package in PACKAGES)


def load_tensorrt() -> TensorRt:
    """The first of `PACKAGES` that builds engines. Raises BundleError saying what to install."""
    problem, told = "This target needs TensorRT, which is not installed", list[str]()
    for package in PACKAGES:
        try:
            found: Any = importlib.import_module(package)
        except ImportError as e:
            told.append(str(e))
            continue
        if all(hasattr(found, name) for name in ("Builder", "OnnxParser", "Refitter")):
            return found  # type: ignore[no-any-return]
        problem = "The TensorRT that is installed only runs engines and cannot build one (a lean or dispatch runtime)"
    raise BundleError(f"{problem}. {INSTALL}.", code="no-runtime", detail="; ".join(told))
