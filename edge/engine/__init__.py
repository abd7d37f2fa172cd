"""ONNX Runtime engines that are rebuilt with other norms in milliseconds and swapped between two frames.

EngineFactory(bundle) ── build(ServingState) ──► Engine ── EngineSlot.swap ──► the frame loop reads .current
                      └─ build_taps(ServingState) ──► TapEngine
"""

from edge.engine.factory import EngineFactory
from edge.engine.session import Engine, EngineSlot, TapEngine
from edge.engine.target import choose_target

__all__ = ["Engine", "EngineFactory", "EngineSlot", "TapEngine", "choose_target"]
