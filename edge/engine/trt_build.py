"""From an ONNX file to a plan whose norms can be exchanged, and the exchange itself.

    parse ─► name the vectors of every norm ─► mark them, and only them, refittable ─► build ─► plan (kept on disk)
    plan ─► engine ─► refit (all vectors of all norms) ─► an engine at another state

TensorRT's parser makes names of its own for a norm's two vectors, and other ones in other versions. They are named here, after
parsing, on the scale layers themselves, which carry the name of their node.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge.engine.trt_api import F32, Config, CudaEngine, Network, PlanBuilder, TensorRt
from refold.atomic import make_directory, write_atomically
from refold.errors import BundleError, StorageError
from refold.tensorrt import BuildRecipe

__all__ = ["build_plan", "keep_plan", "kept_plan", "parsed", "refit", "refittable_weights"]

log = logging.getLogger(__name__)
DIGEST = 32


def build_plan(trt: TensorRt, logger: Any, model: bytes, recipe: BuildRecipe, *, refittable: bool = True) -> bytes:
    """Builds an engine; takes seconds to minutes.

    Args:
        model: ONNX bytes with everything inside.
        refittable: False: an ordinary engine, to compare with.

    Raises:
        BundleError: TensorRT does not take the file, or a norm's vectors cannot be marked.
    """
    builder = trt.Builder(logger)
    with parsed(trt, logger, builder, model, recipe, refittable=refittable) as (network, config):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(trt, "build", "see TensorRT's own messages above")
    return bytes(plan)


@contextmanager
def parsed(
    trt: TensorRt, logger: Any, builder: PlanBuilder, model: bytes, recipe: BuildRecipe, *, refittable: bool = True
) -> Iterator[tuple[Network, Config]]:
    """The network of a file with its norms named and marked, ready to be built. Needs no GPU; network and config hold only
    within, because the parser owns the weights.

    Args and errors: as `build_plan`'s.
    """
    config = builder.create_builder_config()
    network = builder.create_network(_typing(trt, config, recipe))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        told = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise _refused(trt, "parse", told)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_bytes)
    if refittable:
        _mark(trt, network, config, recipe)
    yield network, config
    del parser


def _typing(trt: TensorRt, config: Config, recipe: BuildRecipe) -> int:
    """Flags of the network; where networks are weakly typed, also those of the builder."""
    flags = trt.NetworkDefinitionCreationFlag
    if hasattr(flags, "STRONGLY_TYPED"):
        return 1 << int(flags.STRONGLY_TYPED)
    for name in recipe.weak_flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    return 1 << int(flags.EXPLICIT_BATCH)


def _mark(trt: TensorRt, network: Network, config: Config, recipe: BuildRecipe) -> None:
    scales: dict[str, Any] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.SCALE:
            layer.__class__ = trt.IScaleLayer
            scales[layer.name] = layer
    for site in recipe.sites:
        if site.node and site.node not in scales:
            raise _fixed(trt, site.site, "has no scale layer of its own in the parsed network")
        for vector, name in zip(("scale", "shift"), site.weights, strict=False):
            if site.node and not network.set_weights_name(getattr(scales[site.node], vector), name):
                raise _fixed(trt, site.site, f"has a vector that cannot be called {name}")
    if not hasattr(trt.BuilderFlag, recipe.refit):
        config.set_flag(trt.BuilderFlag.REFIT)
        return
    config.set_flag(getattr(trt.BuilderFlag, recipe.refit))
    for site in recipe.sites:
        for name in site.weights:
            if not network.mark_weights_refittable(name):
                raise _fixed(trt, site.site, f"has no weights {name} to mark")


def refittable_weights(trt: TensorRt, logger: Any, engine: CudaEngine, recipe: BuildRecipe) -> None:
    """Raises BundleError unless every vector of every norm can be exchanged in this engine."""
    there = set(trt.Refitter(engine, logger).get_all_weights())
    for site in recipe.sites:
        for name in site.weights:
            if name not in there:
                raise _fixed(trt, site.site, f"lost {name} when the engine was built")


def refit(trt: TensorRt, logger: Any, engine: CudaEngine, vectors: Mapping[str, F32]) -> None:
    """Puts all vectors into an engine that nobody runs yet.

    Raises:
        BundleError: TensorRT takes one of them not, or wants others besides.
    """
    refitter = trt.Refitter(engine, logger)
    for name, values in vectors.items():
        if not refitter.set_named_weights(name, values):
            raise _refused(trt, "refit", f"{name} was not taken")
    missing = refitter.get_missing_weights()
    if missing:
        raise _refused(trt, "refit", f"it wants {', '.join(missing[:3])} as well")
    if not refitter.refit_cuda_engine():
        raise _refused(trt, "refit", "refit_cuda_engine failed")


def kept_plan(path: Path) -> bytes | None:
    """A plan an earlier start left, or None. A damaged one is said and not used."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    if len(stored) <= DIGEST or hashlib.sha256(stored[DIGEST:]).digest() != stored[:DIGEST]:
        log.warning("%s is damaged: the engine is built again.", path)
        return None
    return stored[DIGEST:]


def keep_plan(path: Path, plan: bytes) -> None:
    """Keeps a plan that has proved itself; a full disk only costs the next start."""
    try:
        make_directory(path.parent)
        write_atomically(path, [hashlib.sha256(plan).digest(), plan])
    except (StorageError, OSError) as e:
        log.warning("The engine is not kept: %s", e)


def _refused(trt: TensorRt, what: str, detail: str) -> BundleError:
    return BundleError(
        f"TensorRT {trt.__version__} does not {what} the bundle's model; export it again, or use another target.",
        code="engine",
        detail=detail,
    )


def _fixed(trt: TensorRt, site: str, why: str) -> BundleError:
    return BundleError(
        f"The engine TensorRT {trt.__version__} makes could not be updated: norm {site} {why}. Use another target.",
        code="not-refittable",
    )
