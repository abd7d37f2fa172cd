"""Engines rebuilt with other norms in milliseconds and swapped between two frames, on ONNX Runtime, LiteRT or TensorRT.

EngineFactory(bundle) ── build(ServingState) ──► Engine ── EngineSlot.swap ──► the frame loop reads .current
                      └─ build_taps(ServingState) ──► TapEngine

`engine.py` says what each of these is; `ort.py`, `litert.py` and `tensorrt.py` are the runtimes.
"""

from edge.engine.engine import Engine, EngineSlot, TapEngine
from edge.engine.factory import EngineFactory
from edge.engine.target import choose_target

__all__ = ["Engine", "EngineFactory", "EngineSlot", "TapEngine", "choose_target"]
