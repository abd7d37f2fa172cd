"""Latency of a network, layer by layer, measured on the real engine of a target on this machine.

ONNX Runtime computes 2- to 7-bit layers in int8 containers: a bit fewer saves bytes, not time. So the table is measured once,
at 8 bits, and holds for every configuration; a search under a latency budget admits all configurations or none, and says so.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch.export import ExportedProgram

from export.engines import session
from export.given import Given
from export.pictures import Pictures
from export.pipeline import Options, make_recipe
from export.targets import write
from refold.preprocess import Preprocess

__all__ = ["SAME_FOR_ALL", "Latencies", "measure_latency"]

SAME_FOR_ALL = (
    "ONNX Runtime runs layers of 2 to 7 bits in 8-bit containers: latency does not fall with bits, so the budget admits every "
    "configuration or none."
)


@dataclass(frozen=True)
class Latencies:
    """Milliseconds for one picture, one thread: of each integer layer and of all else. Their sum is what was timed outside."""

    layers: Mapping[str, float]
    other: float

    @property
    def total(self) -> float:
        return sum(self.layers.values()) + self.other


def measure_latency(
    program: ExportedProgram, given: Given, target: str, preprocess: Preprocess, pictures: Pictures, runs: int = 200
) -> Latencies:
    """Args:
        given: an 8-bit configuration, fit for the target.
        pictures: a few; the first is what the engine is timed on.
    """  # fmt: skip
    recipe = make_recipe(program, preprocess, pictures, Options((target,)), given=given)
    artefact = write(recipe.targets[0], recipe.model)
    x = preprocess.apply(pictures.images[:1])
    tensors, exact = recipe.model.table.tensors() | artefact.codes, recipe.qmax > 64
    engine = session(artefact.model, tensors, exact=exact)
    name = engine.get_inputs()[0].name
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        engine.run(None, {name: x})
        times.append(1e3 * (time.perf_counter() - started))
    with tempfile.TemporaryDirectory(prefix="refold-latency-") as scratch:
        engine = session(artefact.model, tensors, exact=exact, profile=Path(scratch) / "times")
        for _ in range(runs):
            engine.run(None, {name: x})
        events = json.loads(Path(engine.end_profiling()).read_text(encoding="utf-8"))
    layers, other = _by_layer(events, artefact.fused, runs)
    part = median(times) / max(sum(layers.values()) + other, 1e-9)  # watching costs time as well: it is taken out of every part
    return Latencies({name: ms * part for name, ms in layers.items()}, other * part)


def _by_layer(events: list[dict[str, object]], names: tuple[str, ...], runs: int) -> tuple[dict[str, float], float]:
    """Median kernel time of every layer in ms, and of all other nodes together. A fused node's name begins with its layer's."""
    seen: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            seen.setdefault(str(event["name"]).removesuffix("_kernel_time"), []).append(float(str(event["dur"])) / 1e3)
    layers, other = dict.fromkeys(names, 0.0), 0.0
    for node, times in seen.items():
        each = median(times) * len(times) / runs
        owner = max((n for n in names if node == n or node.startswith(f"{n}_")), key=len, default="")
        if owner:
            layers[owner] += each
        else:
            other += each
    return layers, other
