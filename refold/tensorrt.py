"""What export and device agree on for a TensorRT target: symmetric codes, the vectors a norm becomes, and `build.json`.

TensorRT compiles an engine on the device from an ONNX file; afterwards only weights that were marked when it was built can be
changed ("refitted"). A BatchNormalization of the file becomes a scale layer of two vectors inside TensorRT (onnx-tensorrt,
`BatchNormalization` importer and `ModelRefitter::batchnormWeightRefitter`):

    scale = gamma / sqrt(variance + epsilon)        shift = beta - mean * scale

These two, and the explicit vectors of norms that depend on the data, are what a release changes. The integers carry no sign
and the scale may be of any sign, so what bounds gamma elsewhere (`refold.norms`) does not bound it here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from refold.errors import BundleError, NormStateError
from refold.norms import ActivationScale, ExplicitAffine, NormKind, NormSite, NormState, NormTable, refold

__all__ = ["RECIPE", "BuildRecipe", "RefitSite", "file_tensors", "recipe_of", "refit_vectors", "symmetric"]

F32 = NDArray[np.float32]
RECIPE = "build.json"
FORMAT = 1
LOWEST, HIGHEST = -128, 127  # TensorRT's int8


def symmetric(activation: ActivationScale, levels: int = 256) -> tuple[np.float32, tuple[np.float32, np.float32] | None]:
    """An activation's scale without a zero point.

    Codes that already fit around zero keep their scale, so that rounding stays what it was; their range is then a clamp in
    front. All others get the smallest scale that covers the range: one that starts at zero has 0..127 in place of 0..255.

    Returns:
        (scale, the clamp (low, high) where codes would otherwise reach further).
    """
    step, low, high = float(np.float32(activation.scale)), -activation.zero_point, levels - 1 - activation.zero_point
    if low >= LOWEST and high <= HIGHEST:
        clamp = None if (low, high) == (LOWEST, HIGHEST) else (np.float32(low * step), np.float32(high * step))
        return np.float32(step), clamp
    return np.float32(max(-low, high) * step / HIGHEST), None


@dataclass(frozen=True)
class RefitSite:
    """How a norm's state reaches an engine.

    Attributes:
        site: in the norm table.
        node: name of the BatchNormalization node, and so of TensorRT's scale layer; "" for explicit vectors.
        weights: names, in the engine, of the vector that multiplies and of the one that is added; those of a scale layer are
            given when the engine is built, the others are the file's own. One name where nothing is added.
        initialisers: names, in the file, of gamma, beta, mean and variance, or of the explicit vectors.
    """

    site: str
    node: str
    weights: tuple[str, ...]
    initialisers: tuple[str, ...]

    @classmethod
    def of(cls, site: NormSite) -> RefitSite:
        """The site as every file of Refold names it."""
        if site.kind.has_statistics:
            roles = ("gamma", "beta", "mean", "variance")
            return cls(
                site.name,
                f"norm/{site.name}",
                (f"norm/{site.name}/scale", f"norm/{site.name}/shift"),
                tuple(f"{site.name}.norm.{role}" for role in roles),
            )
        names = tuple(n for n in (site.tensors.multiply, site.tensors.add) if n)
        return cls(site.name, "", names, names)


@dataclass(frozen=True)
class BuildRecipe:
    """`build.json`: how a device builds an engine from the file beside it.

    Attributes:
        weak_flags: builder flags before TensorRT 10; from 10 on the network is strongly typed and needs none.
        refit: the builder flag that makes the marked weights, and only these, exchangeable; before TensorRT 10 there is only
            REFIT. Never REFIT_IDENTICAL: with other values than it was built with such an engine's behaviour is undefined.
        workspace_bytes: most memory a kernel may use while it runs.
        profiles: optimisation profiles; none, because all shapes are static. A refittable engine may have one at most.
        integer_layers: layers written between a dequantisation and a quantisation.
        sites: in execution order.
        levels: codes of the activations that have fewer than 256.
    """

    integer_layers: int
    sites: tuple[RefitSite, ...]
    levels: dict[str, int]
    weak_flags: tuple[str, ...] = ("INT8", "FP16")
    refit: str = "REFIT_INDIVIDUAL"
    workspace_bytes: int = 256 << 20
    profiles: int = 0

    def __post_init__(self) -> None:
        if self.refit == "REFIT_IDENTICAL" or "REFIT_IDENTICAL" in self.weak_flags:
            raise BundleError("build.json asks for REFIT_IDENTICAL: norms could not change. Export the model again.")
        if self.profiles > 1:
            raise BundleError("build.json asks for several optimisation profiles: a refittable engine has one at most.")

    def to_json(self) -> bytes:
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> BuildRecipe:
        """Raises BundleError when it is damaged or of a newer format."""
        try:
            d = json.loads(content)
            if d.pop("format") > FORMAT:
                raise BundleError(f"{where} is of a newer format than this program reads. Update Refold.", code="newer-format")
            sites = tuple(
                RefitSite(str(s["site"]), str(s["node"]), tuple(map(str, s["weights"])), tuple(map(str, s["initialisers"])))
                for s in d.pop("sites")
            )
            levels = {str(k): int(v) for k, v in d.pop("levels").items()}
            return cls(
                int(d["integer_layers"]), sites, levels, tuple(map(str, d["weak_flags"])), str(d["refit"]),
                int(d["workspace_bytes"]), int(d["profiles"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise BundleError(f"{where} is damaged: copy or export the bundle again.", code="damaged", detail=str(e)) from e


def refit_vectors(site: NormSite, state: NormState) -> tuple[F32, ...]:
    """What a site's engine weights are at a state, in the order of `RefitSite.weights`; float32 (channels,) each.

    Raises:
        NormStateError: the state does not fit the site.
    """
    explicit = replace(site, kind=NormKind.BATCH) if site.kind is NormKind.FOLDED else site
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        both = refold(explicit, state)
    assert isinstance(both, ExplicitAffine)
    if not np.isfinite(both.multiply).all() or not np.isfinite(both.add).all():
        raise NormStateError(f"A variance of {site.name} is too small to divide by: the state is refused.", code="not-finite")
    return (both.multiply,) if site.kind is NormKind.RMS else (both.multiply, both.add)


def file_tensors(site: NormSite, state: NormState) -> dict[str, F32]:
    """What a site's initialisers are at a state, by their names in the file; float32 (channels,) each."""
    values = (state.gamma, state.beta, state.mean, state.variance)[: 4 if site.kind.has_statistics else 2]
    return dict(zip(RefitSite.of(site).initialisers, values, strict=False))


def recipe_of(table: NormTable, levels: dict[str, int], integer_layers: int) -> BuildRecipe:
    """The recipe of a model with this norm table."""
    return BuildRecipe(integer_layers, tuple(RefitSite.of(s) for s in table.norms), levels)
