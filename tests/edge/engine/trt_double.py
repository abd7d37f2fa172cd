"""Stands in for the `tensorrt` package and a GPU: records every call, and runs the parsed ONNX file in ONNX Runtime.

A refit really changes what an engine answers. `fault` makes it behave as a TensorRT that cannot do what is asked.
"""

from __future__ import annotations

import enum
import json
from base64 import b64decode, b64encode
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

Named = dict[str, tuple[str, str]]  # weights → (BatchNormalization node, scale or shift)


class Gpu:
    """`edge.engine.cuda.Cuda` in host memory."""

    def __init__(self, calls: list[tuple[Any, ...]], name: str = "Double GPU") -> None:
        self.name, self.calls = name, calls
        self.memory: dict[int, bytes] = {}
        self._next = 1

    def enter(self) -> None:
        pass

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def stream(self) -> int:
        return self._handle()

    def allocate(self, size: int) -> int:
        address = self._handle()
        self.memory[address] = bytes(size)
        return address

    def upload(self, address: int, source: np.ndarray, stream: int) -> None:
        assert source.dtype == np.float32 and source.flags.c_contiguous and source.nbytes == len(self.memory[address])
        self.memory[address] = source.tobytes()

    def download(self, target: np.ndarray, address: int, stream: int) -> None:
        target[...] = np.frombuffer(self.memory[address], np.float32).reshape(target.shape)

    def synchronise(self, stream: int) -> None:
        pass

    def release(self, stream: int, addresses: tuple[int, ...]) -> None:
        for address in addresses:
            del self.memory[address]


class Layer:
    def __init__(self, name: str, kind: str, scale: np.ndarray, shift: np.ndarray) -> None:
        self.name, self.type, self.vectors = name, kind, {"scale": scale, "shift": shift}


class ScaleLayer(Layer):
    @property
    def scale(self) -> np.ndarray:
        return self.vectors["scale"]

    @property
    def shift(self) -> np.ndarray:
        return self.vectors["shift"]


class TensorRtDouble:
    """Args:
    modern: as 10 and later; else as 8.6.
    fault: parse, no-plan, renamed, unnamed, unmarked, lost, refuses, missing, fails, stale, drops or context.
    """

    def __init__(self, *, modern: bool = True, version: str = "", fault: str = "") -> None:
        self.__version__ = version or ("10.9.0" if modern else "8.6.1")
        self.calls: list[tuple[Any, ...]] = []
        self.fault = fault
        self.gpu = Gpu(self.calls)
        flags = ["INT8", "FP16", "REFIT", "REFIT_IDENTICAL", *(["REFIT_INDIVIDUAL"] if modern else [])]
        self.BuilderFlag = enum.Enum("BuilderFlag", flags)
        network = {"EXPLICIT_BATCH": 0, **({"STRONGLY_TYPED": 1} if modern else {})}
        self.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", network)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.LayerType = SimpleNamespace(SCALE="scale", OTHER="other")
        self.IScaleLayer = ScaleLayer

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [c for c in self.calls if c[0] == name]

    class Logger:
        WARNING = 2

        def __init__(self, severity: int) -> None:
            self.severity = severity

    def Builder(self, logger: Any) -> _Builder:  # noqa: N802
        return _Builder(self)

    def OnnxParser(self, network: _Network, logger: Any) -> _Parser:  # noqa: N802
        return _Parser(self, network)

    def Runtime(self, logger: Any) -> _Reader:  # noqa: N802
        return _Reader(self)

    def Refitter(self, engine: _Engine, logger: Any) -> _Refitter:  # noqa: N802
        return _Refitter(self, engine)


class _Config:
    def __init__(self, trt: TensorRtDouble) -> None:
        self.trt, self.flags = trt, []

    def set_flag(self, flag: Any) -> None:
        self.trt.calls.append(("set_flag", flag.name))
        self.flags.append(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.trt.calls.append(("workspace", size))


class _Network:
    def __init__(self, trt: TensorRtDouble) -> None:
        self.trt, self.layers, self.named, self.marked, self.model = trt, [], {}, [], b""
        self.constants: set[str] = set()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    def set_weights_name(self, weights: np.ndarray, name: str) -> bool:
        for layer in self.layers:
            for vector, held in layer.vectors.items():
                if held is weights and self.trt.fault != "unnamed":
                    self.named[name] = (layer.name, vector)
                    return True
        return False

    def mark_weights_refittable(self, name: str) -> bool:
        known = name in self.named or name in self.constants
        if known and self.trt.fault != "unmarked":
            self.trt.calls.append(("mark", name))
            self.marked.append(name)
            return True
        return False


class _Parser:
    num_errors = 1

    def __init__(self, trt: TensorRtDouble, network: _Network) -> None:
        self.trt, self.network = trt, network

    def get_error(self, index: int) -> str:
        return "the double does not parse"

    def parse(self, model: bytes) -> bool:
        if self.trt.fault == "parse":
            return False
        graph = onnx.load_from_string(model).graph
        self.network.model = model
        held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.network.constants = set(held)
        for node in graph.node:
            if node.op_type == "BatchNormalization":
                gamma, beta, mean, variance = (held[n] for n in node.input[1:])
                scale = gamma / np.sqrt(variance + node.attribute[0].f)
                name = "norm" if self.trt.fault == "renamed" else node.name
                self.network.layers.append(Layer(name, "scale", scale, beta - mean * scale))
            else:
                self.network.layers.append(Layer(node.name, "other", np.zeros(0), np.zeros(0)))
        return True


class _Builder:
    def __init__(self, trt: TensorRtDouble) -> None:
        self.trt = trt

    def create_network(self, flags: int) -> _Network:
        self.trt.calls.append(("network", flags))
        return _Network(self.trt)

    def create_builder_config(self) -> _Config:
        return _Config(self.trt)

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        self.trt.calls.append(("build", tuple(config.flags)))
        if self.trt.fault == "no-plan":
            return None
        everything = [*network.named, *network.constants]
        refittable = network.marked if "REFIT_INDIVIDUAL" in config.flags else everything if "REFIT" in config.flags else []
        if self.trt.fault == "lost":
            refittable = [n for n in refittable if not n.endswith("shift")]
        model = network.model
        if self.trt.fault == "drops" and refittable:
            model = _with(model, {n.input[2]: None for n in onnx.load_from_string(model).graph.node if n.op_type == "Gemm"})
        told = {
            "by": self.trt.__version__,
            "named": network.named,
            "refittable": refittable,
            "model": b64encode(model).decode(),
        }
        return memoryview(json.dumps(told).encode())


class _Reader:
    def __init__(self, trt: TensorRtDouble) -> None:
        self.trt = trt

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        self.trt.calls.append(("deserialise",))
        try:
            told = json.loads(bytes(plan))
        except ValueError:
            return None
        return _Engine(self.trt, told) if told["by"] == self.trt.__version__ else None


class _Engine:
    def __init__(self, trt: TensorRtDouble, told: dict[str, Any]) -> None:
        self.trt, self.model = trt, b64decode(told["model"])
        self.named: Named = {k: (v[0], v[1]) for k, v in told["named"].items()}
        self.refittable: list[str] = told["refittable"]
        self.running = False

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        graph = onnx.load_from_string(self.model).graph
        value = next(v for v in (*graph.input, *graph.output) if v.name == name)
        return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)

    def create_execution_context(self) -> _Context | None:
        self.trt.calls.append(("context",))
        self.running = True
        return None if self.trt.fault == "context" else _Context(self)


class _Refitter:
    def __init__(self, trt: TensorRtDouble, engine: _Engine) -> None:
        assert not engine.running, "an engine somebody runs is never refitted"
        self.trt, self.engine, self.given = trt, engine, {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.refittable)

    def set_named_weights(self, name: str, weights: np.ndarray) -> bool:
        if name not in self.engine.refittable or self.trt.fault == "refuses":
            return False
        assert weights.dtype == np.float32 and weights.flags.c_contiguous
        self.given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return ["another.weight"] if self.trt.fault == "missing" else []

    def refit_cuda_engine(self) -> bool:
        self.trt.calls.append(("refit", tuple(sorted(self.given))))
        if self.trt.fault == "fails":
            return False
        if self.trt.fault != "stale":
            nodes = {n.name: n for n in onnx.load_from_string(self.engine.model).graph.node}
            values: dict[str, np.ndarray | None] = {}
            for name, vector in self.given.items():
                if name not in self.engine.named:
                    values[name] = vector
                    continue
                node, role = self.engine.named[name]
                _, gamma, beta, mean, variance = nodes[node].input
                values |= {gamma: vector} if role == "scale" else {beta: vector}
                values |= {mean: None, variance: np.full_like(vector, 1 - nodes[node].attribute[0].f)}
            self.engine.model = _with(self.engine.model, values)
        return True


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.addresses = engine, {}
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(engine.model, options, providers=["CPUExecutionProvider"])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        gpu, entry, answer = self.engine.trt.gpu, self.session.get_inputs()[0], self.session.get_outputs()[0]
        x = np.frombuffer(gpu.memory[self.addresses[entry.name]], np.float32).reshape(entry.shape)
        gpu.memory[self.addresses[answer.name]] = self.session.run(None, {entry.name: x})[0].tobytes()
        return True


def _with(model: bytes, values: dict[str, np.ndarray | None]) -> bytes:
    """Other values in initialisers; None: zeros."""
    loaded = onnx.load_from_string(model)
    for tensor in loaded.graph.initializer:
        if tensor.name in values:
            old, new = numpy_helper.to_array(tensor), values[tensor.name]
            array = np.zeros_like(old) if new is None else np.asarray(new, old.dtype).reshape(old.shape)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return loaded.SerializeToString()
