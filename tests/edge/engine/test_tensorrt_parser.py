"""NVIDIA's own parser, of TensorRT for RTX, reads what we export: it needs no GPU, only building and running do."""

from __future__ import annotations

import export_nets
import pytest

from edge.engine.trt_api import load_tensorrt, tensorrt_installed
from edge.engine.trt_build import parsed
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold import Bundle
from refold.errors import BundleError
from refold.tensorrt import BuildRecipe

pytestmark = pytest.mark.skipif(not tensorrt_installed(), reason="neither tensorrt nor tensorrt_rtx is installed here")


@pytest.fixture(scope="module", params=["residual", "inverted", "dense", "convnext", "vit"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("trt") / "m.refold"
    options = Options(("tensorrt",), request.param, observer="minmax", min_agreement=0)
    net = export_nets.make(request.param)
    return export_model(net, path, export_nets.PREPROCESS, Pictures(export_nets.pictures(24), None), options).bundle


@pytest.fixture(scope="module")
def trt():
    return load_tensorrt()


def read(bundle: Bundle, trt, model: bytes, recipe: BuildRecipe) -> list[tuple[str, str]]:
    """(name, type) of every layer of the network with its norms marked."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    with parsed(trt, logger, builder, model, recipe) as (network, _):
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        return [(layer.name, layer.type.name) for layer in layers]


def recipe_of(bundle: Bundle) -> BuildRecipe:
    return BuildRecipe.from_json(bundle.read("targets/tensorrt/build.json"), "build.json")


def test_it_parses_and_every_norm_can_be_named_and_marked(bundle: Bundle, trt) -> None:
    recipe = recipe_of(bundle)
    layers = read(bundle, trt, bundle.read("targets/tensorrt/model.onnx"), recipe)
    kinds = [kind for _, kind in layers]
    scales = {name for name, kind in layers if kind == "SCALE"}
    wanted = {site.node for site in recipe.sites if site.node}
    assert wanted <= scales and len(wanted) == sum(s.kind.has_statistics for s in bundle.norms.norms)
    assert kinds.count("QUANTIZE") and kinds.count("DEQUANTIZE") >= 2 * recipe.integer_layers


def test_a_norm_that_is_not_in_the_file_is_said_by_name(bundle: Bundle, trt) -> None:
    recipe = recipe_of(bundle)
    if not any(s.kind.has_statistics for s in bundle.norms.norms):
        pytest.skip("no norm with statistics in this net")
    there = bundle.read("targets/tensorrt/model.onnx")
    site = next(site for site in recipe.sites if site.node)
    renamed = there.replace(site.node.encode(), site.node.replace("norm", "nrom").encode())
    with pytest.raises(BundleError, match="could not be updated") as said:
        read(bundle, trt, renamed, recipe)
    assert said.value.code == "not-refittable" and site.site in said.value.message


def test_a_damaged_file_is_refused_in_a_sentence(bundle: Bundle, trt) -> None:
    with pytest.raises(BundleError, match="does not parse the bundle's model") as said:
        read(bundle, trt, bundle.read("targets/tensorrt/model.onnx")[:200], recipe_of(bundle))
    assert said.value.code == "engine"
