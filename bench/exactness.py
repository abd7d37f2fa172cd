"""The promise the product rests on: integers shipped once, refolded to any admissible state, are that state's own export.

For each net 100 random admissible states. For each the device's engine (same file, other norms) is compared with a fresh export
at that state, which starts from the float weights: every integer of every layer, every adaptable tensor, and the logits on real
pictures, all bit for bit. Then what it costs: a release's bytes, the swap, and int8 against fp32 time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort

from bench.bundles import NETS, Subject, subject
from bench.paired import paired
from bench.result import Cell, Claim, Options, Result, number, progress, stage
from edge.engine import Engine, EngineFactory, EngineSlot
from edge.serving import ServingState
from export.engines import infer, session
from export.pipeline import fresh_export
from refold.errors import NormStateError, UsageError
from refold.norms import NormSite, NormState, NormTable, check_state
from refold.release import Release, seal
from refold.signing import SigningKey

__all__ = ["claims", "plot", "random_states", "run"]

STRENGTHS = (0.02, 0.1, 0.3, 0.6)  # of a state: octaves of gamma, and of the rest in proportion
COUNT = {"resnet8": 200, "resnet20": 200, "mobilenetv2": 20, "resnet50": 5}  # inferences in one timed block


def random_states(table: NormTable, strength: float, seed: int) -> dict[str, NormState]:
    """An admissible state of every norm, every number drawn by itself.

    gamma and the deviation move by up to `strength` octaves, beta by normal draws of `strength` / 2, the mean by as much in
    deviations.
    """
    rng = np.random.default_rng(seed)
    return {site.name: _random_state(site, strength, rng) for site in table.norms}


def _random_state(site: NormSite, strength: float, rng: np.random.Generator) -> NormState:
    e = site.exported
    n = e.gamma.shape
    gamma = e.gamma * np.exp2(rng.uniform(-strength, strength, n))
    beta = e.beta + rng.normal(0, strength / 2, e.beta.shape)
    mean = e.mean + rng.normal(0, strength / 2, e.mean.shape) * np.sqrt(e.variance)
    variance = e.variance * np.exp2(rng.uniform(-2 * strength, 2 * strength, e.variance.shape))
    state = NormState(*(np.asarray(v, np.float32) for v in (gamma, beta, mean, variance)))
    check_state(site, state)
    return state


def run(options: Options) -> Result:
    """Full: four nets, 100 states each. Quick: ResNet-20, ResNet-8 and MobileNetV2, 10 states each."""
    names = [n for n in NETS if options.wants(n) and not (options.quick and n == "resnet50")]
    if not names:
        raise UsageError(f"No net is called like {', '.join(options.only)}; there are {', '.join(NETS)}.")
    states = 10 if options.quick else 100
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="refold-bench-") as folder, progress() as bar:
        for name in names:
            task = bar.add_task(f"{name}: export", total=None)
            net = subject(name, Path(folder), stage(bar, task, name))
            factory = EngineFactory(net.bundle)
            bar.update(task, description=f"{name}: states", total=states, completed=0)
            row: dict[str, Cell] = {"net": name, "weights": net.net.weights, "side": net.net.side}
            row |= _compare(net, factory, states, options.seed, partial(bar.advance, task))
            bar.update(task, description=f"{name}: times")
            row |= _size(net)
            row |= _swap_time(net, factory, 5 if options.quick else 15)
            row |= _latency(net, factory, 5 if options.quick else 11)
            rows.append(row)
            bar.update(task, description=f"{name}: done")
    columns = ["net", "states", "identical", "integers", "adaptable", "release B", "bundle B", "release %", "swap ms"]
    columns += ["int8 ms", "fp32 ms", "int8 ÷ fp32"]
    settings: dict[str, object] = {"states": states, "strengths": STRENGTHS, "threads": 1, "batch": 1, "seed": options.seed}
    return Result("exactness", rows, claims(rows), columns, settings, options.quick)


def _compare(net: Subject, factory: EngineFactory, count: int, seed: int, advance: Any) -> dict[str, Cell]:
    """How many states came out the same in each respect."""
    table, recipe = net.bundle.norms, net.exported.recipe
    x = net.bundle.preprocess.apply(net.frames(8 if net.net.side == 32 else 2, seed=1))
    exported = factory.build(ServingState()).run(x)
    same = {"integers": 0, "tensors": 0, "logits": 0}
    identical = drawn = different = 0
    while identical < count and drawn < 3 * count:
        strength = STRENGTHS[drawn % len(STRENGTHS)]
        states = random_states(table, strength, seed * 10_000 + drawn)
        drawn += 1
        try:
            ours = table.tensors(states)
        except NormStateError:
            continue  # a bias beyond int32: refused on the device as well, so not one of the admissible states
        logits = factory.build(ServingState(states)).run(x)
        artefact, fresh = fresh_export(recipe, states)
        theirs = infer(session(artefact.model), x)
        layers = [n for n in recipe.model.graph.nodes if n.output in recipe.model.weights]
        integers = all(np.array_equal(recipe.model.codes(n), fresh.codes(n)) for n in layers)
        tensors = _equal(ours, fresh.table.tensors({}))
        agreed = np.array_equal(logits, theirs)
        same["integers"] += integers
        same["tensors"] += tensors
        same["logits"] += agreed
        identical += 1
        different += not np.array_equal(logits, exported)
        advance()
    return {
        "states": identical,
        "refused draws": drawn - identical,
        "identical": min(same.values()),
        "integers identical": same["integers"],
        "tensors identical": same["tensors"],
        "logits identical": same["logits"],
        "states that change the logits": different,
        "integers": sum(w.codes.size for w in recipe.model.weights.values()),
        "adaptable": int(sum(np.asarray(v).size for v in table.tensors({}).values())),
    }


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """The same names, types and bytes."""
    if set(a) != set(b):
        return False
    pairs = [(np.asarray(a[k]), np.asarray(b[k])) for k in a]
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def _size(net: Subject) -> dict[str, Cell]:
    """A release of every norm and every activation scale, signed by one key, against the bundle's file."""
    table = net.bundle.norms
    release = Release(net.bundle.digest, "bench", 1, {s.name: s.exported for s in table.norms}, activations=table.activations)
    size = seal(release, SigningKey.generate()).ByteSize()
    parts = {p.path: p.size for p in net.bundle.parts}
    return {
        "release B": size,
        "bundle B": net.bundle.size,
        "release %": round(100 * size / net.bundle.size, 3),
        "model B": parts[net.bundle.target().model],
        "calibration pictures": net.net.calibration,
    }


def _swap_time(net: Subject, factory: EngineFactory, swaps: int) -> dict[str, Cell]:
    """From a decoded release to the first frame it can serve: build, canary, swap. Median."""
    slot: EngineSlot = EngineSlot(factory.build(ServingState()))
    factory.canary(slot.current)
    whole, pointer = [], []
    for i in range(swaps):
        states = random_states(net.bundle.norms, STRENGTHS[0], i)
        started = time.perf_counter()
        engine = factory.build(ServingState(states))
        factory.canary(engine)
        built = time.perf_counter()
        previous = slot.swap(engine)
        ended = time.perf_counter()
        whole.append(ended - started)
        pointer.append(ended - built)
        del previous  # closing a session takes longer than swapping it
    return {"swap ms": round(1e3 * median(whole), 2), "swaps": swaps, "pointer µs": round(1e6 * median(pointer), 2)}


def _latency(net: Subject, factory: EngineFactory, pairs: int) -> dict[str, Cell]:
    """The device's engine against the same net in fp32 on ONNX Runtime, norms folded, both on one thread at batch 1."""
    x = net.bundle.preprocess.apply(net.frames(1))
    engine: Engine = factory.build(ServingState())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    floating = ort.InferenceSession(net.float_onnx, options, providers=["CPUExecutionProvider"])
    count = COUNT[net.name]

    def integer() -> None:
        for _ in range(count):
            engine.run(x)

    def real() -> None:
        for _ in range(count):
            floating.run(["logits"], {"input": x})

    times = paired(integer, real, pairs)
    int8, fp32 = times.each(count)
    return {
        "int8 ms": round(int8, 4),
        "fp32 ms": round(fp32, 4),
        "int8 ÷ fp32": round(times.ratio, 4),
        "ratio min": round(min(times.ratios), 4),
        "ratio max": round(max(times.ratios), 4),
        "integer layers": factory.integer_layers,
        "expected integer layers": factory.expected_integer_layers,
    }


def claims(rows: list[dict[str, Cell]]) -> list[Claim]:
    """Issue 2, "Shows" 3."""
    out = []
    for row in rows:
        net = str(row["net"])
        states = number(row["states"])
        text = f"{net}: states bit-identical to a fresh export (integers, tensors, logits), of {states:.0f}"
        out.append(Claim(f"exactness.{net}.identical", text, number(row["identical"]), "≥", states))
        out.append(
            Claim(f"exactness.{net}.release", f"{net}: release ÷ bundle", number(row["release %"]), "≤", 2.0, None, " %")
        )
        text = f"{net}: int8 ÷ fp32 latency, batch 1"
        out.append(Claim(f"exactness.{net}.latency", text, number(row["int8 ÷ fp32"]), "≤", 0.75))
    return out


def plot(result: Result, path: Path) -> None:
    """Release against bundle, swap time against one inference, int8 against fp32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [str(r["net"]) for r in result.rows]
    figure, (sizes, swaps, ratios) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    places = np.arange(len(names))
    for shift, key, label in ((-0.2, "bundle B", "bundle"), (0.2, "release B", "release")):
        sizes.bar(places + shift, [number(r[key]) / 1000 for r in result.rows], 0.4, label=label)
    sizes.set_yscale("log")
    sizes.set_ylabel("kB")
    sizes.legend()
    swaps.bar(places, [number(r["swap ms"]) for r in result.rows], 0.5)
    swaps.set_yscale("log")
    swaps.set_ylabel("build, canary and swap, ms")
    ratios.bar(places, [number(r["int8 ÷ fp32"]) for r in result.rows], 0.5)
    ratios.axhline(0.75, color="#d0342c", linestyle="--")
    ratios.set_ylabel("int8 ÷ fp32 latency, batch 1 (dashed: bar)")
    for axes in (sizes, swaps, ratios):
        axes.set_xticks(places, names)
    identical = sum(int(number(r["identical"])) for r in result.rows)
    states = sum(int(number(r["states"])) for r in result.rows)
    figure.suptitle(f"{identical} of {states} random states bit-identical to a fresh export")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
