"""The TensorRT engine against a recording double: what is asked of TensorRT, in which order, and what is refused.

The last test asks a real TensorRT the same, where there is one with a GPU.
"""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import export_nets
import numpy as np
import onnxruntime as ort
import pytest
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from trt_double import Gpu, TensorRtDouble

from edge.engine import EngineFactory, EngineSlot, choose_target, trt_api
from edge.engine import cuda as cuda_module
from edge.engine import target as target_module
from edge.engine import tensorrt as engine_module
from edge.engine.onnx_graph import OnnxGraph
from edge.engine.tensorrt import TensorRtRuntime, distant
from edge.serving import ServingState
from refold import Bundle, write_bundle
from refold.errors import BundleError, InputError, NormStateError
from refold.tensorrt import BuildRecipe, file_tensors, refit_vectors, symmetric

MODEL, TAPS, RECIPE = (f"targets/tensorrt/{name}" for name in ("model.onnx", "taps.onnx", "build.json"))
ALL = ["norm/stem.1/scale", "norm/stem.1/shift", "norm/mid.1/scale", "norm/mid.1/shift", "norm.multiply", "norm.add"]


class Mixed(nn.Module):
    """Two norms behind convolutions, one layer norm behind the last tap, a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = export_nets.ConvNorm(3, 8, 3, 2, act=nn.ReLU())
        self.mid = export_nets.ConvNorm(8, 8)
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, export_nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits: Tensor = self.fc(self.norm(F.relu(self.mid(x) + x).mean((2, 3))))
        return logits


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from export.pictures import Pictures
    from export.pipeline import Options, export_model

    net = Mixed()
    nn.init.normal_(net.fc.bias, 0, 2.0)
    path = tmp_path_factory.mktemp("trt") / "mixed.refold"
    options = Options(("tensorrt",), "mixed", tuple("abcde"), observer="minmax", min_agreement=0)
    pictures = Pictures(export_nets.pictures(24), None)
    return export_model(export_nets.settled(net.eval()), path, export_nets.PREPROCESS, pictures, options).bundle


@pytest.fixture(scope="module")
def trial() -> np.ndarray:
    return export_nets.pictures(3, seed=7)


@pytest.fixture
def opened(bundle, trial, tmp_path):
    def open_with(trt: TensorRtDouble, *, cache=tmp_path / "cache", of=bundle) -> TensorRtRuntime:
        return TensorRtRuntime(of, "tensorrt", trial, cache=cache, trt=trt, cuda=trt.gpu)

    return open_with


@pytest.fixture(scope="module")
def runtime(bundle, trial) -> TensorRtRuntime:
    trt = TensorRtDouble()
    return TensorRtRuntime(bundle, "tensorrt", trial, cache=None, trt=trt, cuda=trt.gpu)


def file_answers(bundle, x, states, part=MODEL, values=None):
    """The file at a state, in ONNX Runtime as written."""
    found = dict(values or {})
    for site in bundle.norms.norms:
        found |= file_tensors(site, states.get(site.name, site.exported))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(OnnxGraph(bundle.read(part)).with_values(found), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": x[i : i + 1]})[0] for i in range(len(x))])


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Scale and shift are rounded once, the file's four vectors operator by operator: a code on a tie may fall either way."""
    return bool(np.abs(a - b).max() <= 0.03 * b.std())


# What is asked of TensorRT ---------------------------------------------------------------------------------------------------


def test_an_engine_is_built_with_exactly_the_norms_marked(opened):
    trt = TensorRtDouble()
    opened(trt)
    assert trt.called("network") == [("network", 1 << 1)] * 2, "strongly typed: precision is the file's"
    assert trt.called("build") == [("build", ("REFIT_INDIVIDUAL",)), ("build", ())], "then an ordinary engine to compare with"
    assert [name for _, name in trt.called("mark")] == ALL
    assert trt.called("workspace") == [("workspace", 256 << 20)] * 2


def test_an_older_tensorrt_makes_everything_refittable(opened, bundle, trial):
    trt = TensorRtDouble(modern=False)
    engine = opened(trt).build(ServingState())
    assert trt.called("build") == [("build", ("INT8", "FP16", "REFIT")), ("build", ("INT8", "FP16"))]
    assert trt.called("network")[0] == ("network", 1) and not trt.called("mark")
    assert trt.called("refit")[-1] == ("refit", tuple(sorted(ALL)))
    assert close(engine.run_pictures(trial), file_answers(bundle, bundle.preprocess.apply(trial), {}))


def test_a_second_engine_is_refitted_before_it_is_ever_run(opened, bundle, trial):
    trt = TensorRtDouble()
    runtime = opened(trt)
    first = runtime.build(ServingState())
    answer = first.run_pictures(trial)
    start = len(trt.calls)
    second = runtime.build(ServingState(distant(bundle.norms), release_version=2))
    assert trt.calls[start:] == [("deserialise",), ("refit", tuple(sorted(ALL))), ("context",)]
    assert np.array_equal(first.run_pictures(trial), answer), "who still runs the old engine keeps it"
    assert not close(second.run_pictures(trial), answer) and second.serving.release_version == 2 and first.pictures is None


@pytest.mark.parametrize("seed", range(3))
def test_every_state_is_answered_as_the_file_does(runtime, bundle, trial, seed):
    states, x = distant(bundle.norms, seed), bundle.preprocess.apply(trial)
    engine = runtime.build(ServingState(states))
    assert close(engine.run(x), file_answers(bundle, x, states))
    np.testing.assert_array_equal(engine.run_pictures(trial), engine.run(x))
    for wrong in (x[:, :, :8], x.astype(np.float64), x[0], x[:0]):
        with pytest.raises(InputError, match="does not take an input of shape"):
            engine.run(wrong)


def test_gamma_may_change_its_sign(runtime, bundle, trial):
    """The integers carry no sign here: what the norm table forbids other targets is nothing to this one."""
    site, x = bundle.norms.site("stem.1"), bundle.preprocess.apply(trial)
    flipped = {"stem.1": replace(site.exported, gamma=-site.exported.gamma)}
    np.testing.assert_array_equal(refit_vectors(site, flipped["stem.1"])[0], -refit_vectors(site, site.exported)[0])
    engine = runtime.build(ServingState(flipped))
    assert close(engine.run(x), file_answers(bundle, x, flipped))


def test_the_tap_engine_ends_at_its_last_norm(opened, bundle, trial):
    trt = TensorRtDouble()
    runtime = opened(trt)
    states, x = distant(bundle.norms, 2), bundle.preprocess.apply(trial)
    taps = runtime.build_taps(ServingState(states), TAPS)
    moments = taps.run(x)
    assert moments.shape == (3, 2, 16) and trt.called("refit")[-1] == ("refit", tuple(sorted(ALL[:4])))
    wanted = file_answers(bundle, x, states, TAPS)
    assert np.abs(moments - wanted).max() <= 0.03 * wanted.std()


def test_other_activation_scales_cost_another_plan(opened, bundle, trial):
    trt = TensorRtDouble()
    runtime = opened(trt)
    x, built = bundle.preprocess.apply(trial), len(trt.called("build"))
    scales = tuple(replace(a, scale=a.scale * 1.5) for a in bundle.norms.activations[:2])
    values = {f"{a.tensor}.scale": np.asarray(symmetric(a)[0]) for a in scales}
    for _ in range(2):
        engine = runtime.build(ServingState({}, scales))
        assert close(engine.run(x), file_answers(bundle, x, {}, values=values))
    assert len(trt.called("build")) == built + 2, "once, with its proof"
    assert not np.array_equal(engine.run(x), runtime.build(ServingState()).run(x))
    for odd in (replace(scales[0], tensor="nowhere"), replace(scales[0], scale=-1.0)):
        with pytest.raises(NormStateError):
            runtime.build(ServingState({}, (odd,)))


def test_swaps_under_load_give_exactly_old_or_new(opened, bundle, trial):
    trt = TensorRtDouble()
    runtime, x = opened(trt), bundle.preprocess.apply(trial[:1])
    states = [ServingState(distant(bundle.norms, s), release_version=s) for s in range(2)]
    engines = [runtime.build(s) for s in states]
    answers = [e.run(x) for e in engines]
    slot, stop, wrong, served = EngineSlot(engines[0]), threading.Event(), [], set()

    def load():
        while not stop.is_set():
            engine = slot.current
            served.add(engine.serving.release_version)
            if not np.array_equal(engine.run(x), answers[engine.serving.release_version]):
                wrong.append(engine.serving)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for t in threads:
        t.start()
    for i in range(8):
        slot.swap(runtime.build(states[(i + 1) % 2]))
    stop.set()
    for t in threads:
        t.join()
    assert not wrong and slot.swaps == 8 and served == {0, 1}
    slot.current = None
    engines.clear()
    gc.collect()
    assert not trt.gpu.memory, "an engine nobody runs gives its memory back"


# What is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("parse", "engine", "does not parse the bundle's model"),
        ("no-plan", "engine", "does not build the bundle's model"),
        ("renamed", "not-refittable", "norm stem.1 has no scale layer of its own"),
        ("unnamed", "not-refittable", "cannot be called norm/stem.1/scale"),
        ("unmarked", "not-refittable", "no weights norm/stem.1/scale to mark"),
        ("lost", "not-refittable", "lost norm/stem.1/shift when the engine was built"),
        ("refuses", "engine", "does not refit"),
        ("missing", "engine", "does not refit"),
        ("fails", "engine", "does not refit"),
        ("stale", "refit-differs", "does not answer as the bundle's file at other norms"),
        ("drops", "refit-differs", "does not answer as an engine that cannot be refitted"),
        ("context", "gpu", "cannot make room"),
    ],
)
def test_an_engine_that_could_not_be_updated_is_never_used(opened, tmp_path, fault, code, says):
    with pytest.raises(BundleError, match=says) as said:
        opened(TensorRtDouble(fault=fault))
    assert said.value.code == code and said.value.exit_code == 5
    assert not list((tmp_path / "cache").glob("*")), "and nothing of it is kept"


def test_a_state_of_another_model(runtime, bundle):
    state = replace(bundle.norms.site("stem.1").exported, gamma=[1.0])
    with pytest.raises(NormStateError, match="another model"):
        runtime.build(ServingState({"stem.1": state}))


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        (RECIPE, lambda b: b[:40], "build.json of .* is damaged"),
        (RECIPE, lambda b: b.replace(b"REFIT_INDIVIDUAL", b"REFIT_IDENTICAL"), "REFIT_IDENTICAL"),
        (RECIPE, lambda b: b.replace(b'"format": 1', b'"format": 9'), "newer format"),
        (RECIPE, lambda b: b.replace(b"norm/stem.1/scale", b"norm/other/scale"), "disagree about the norms"),
        (RECIPE, lambda b: b.replace(b'"profiles": 0', b'"profiles": 2'), "one at most"),
        (MODEL, lambda b: b.replace(b"stem.1.norm.gamma", b"stem.1.form.gamma"), "disagree about stem.1.norm.gamma"),
        (MODEL, lambda b: b"\xff\xffno model", "not readable as ONNX"),
    ],
)
def test_damaged_parts(opened, bundle, tmp_path, part, change, says):
    parts = {p.path: bundle.read(p.path) for p in bundle.parts}
    parts[part] = change(parts[part])
    with pytest.raises(BundleError, match=says):
        opened(TensorRtDouble(), of=write_bundle(tmp_path / "other.refold", bundle.manifest, parts))


# The cache -------------------------------------------------------------------------------------------------------------------


def test_a_plan_is_kept_for_this_bundle_version_and_gpu(opened, bundle, trial, tmp_path, caplog):
    first = TensorRtDouble()
    answer = opened(first).build(ServingState()).run_pictures(trial)
    (kept,) = (tmp_path / "cache").iterdir()
    again = TensorRtDouble()
    np.testing.assert_array_equal(opened(again).build(ServingState()).run_pictures(trial), answer)
    assert not again.called("build")

    whole = kept.read_bytes()
    for damage in (whole[:-9], whole[:20], b"", whole[:-1] + b"\0"):
        kept.write_bytes(damage)
        again = TensorRtDouble()
        np.testing.assert_array_equal(opened(again).build(ServingState()).run_pictures(trial), answer)
        assert again.called("build") and kept.read_bytes() == whole
    assert "is damaged: the engine is built again" in caplog.text

    newer, other = TensorRtDouble(version="10.10.0"), TensorRtDouble()
    other.gpu = Gpu(other.calls, "Another GPU")
    for trt in (newer, other):
        opened(trt)
        assert trt.called("build")
    assert len(list((tmp_path / "cache").glob("*.plan"))) == 3 == len(list((tmp_path / "cache").iterdir()))


def test_a_plan_tensorrt_does_not_open_is_built_again(opened, tmp_path, monkeypatch, caplog):
    opened(TensorRtDouble())
    trt = TensorRtDouble()
    monkeypatch.setattr(engine_module, "kept_plan", lambda path: b"of another machine")
    opened(trt)
    assert trt.called("build") and "is not of this TensorRT" in caplog.text


def test_a_cache_that_cannot_be_written_costs_only_the_next_start(opened, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    opened(TensorRtDouble(), cache=tmp_path / "file")
    assert "The engine is not kept" in caplog.text


# Where it is chosen ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def jetson(monkeypatch) -> TensorRtDouble:
    """A machine on which `import tensorrt` works and a GPU answers."""
    trt, real = TensorRtDouble(), target_module._installed
    monkeypatch.setattr(target_module, "_installed", lambda runtime: runtime == "tensorrt" or real(runtime))
    monkeypatch.setattr(target_module, "gpu_present", lambda: True)
    monkeypatch.setattr(engine_module, "load_tensorrt", lambda: trt)
    monkeypatch.setattr(engine_module, "DriverCuda", lambda: trt.gpu)
    return trt


def test_the_factory_opens_it_and_asks_the_canary(jetson, bundle, trial, tmp_path):
    factory = EngineFactory(bundle, cache=tmp_path)
    assert factory.target == "tensorrt" and factory.integer_layers == factory.expected_integer_layers == 3
    assert factory.runtime.named == "TensorRT 10.9.0 on Double GPU" and factory.runtime.platform == "tensorrt_plan"
    factory.canary(factory.build(ServingState(distant(bundle.norms))))
    assert factory.has_taps and factory.build_taps(ServingState()).run(bundle.preprocess.apply(trial)).shape == (3, 2, 16)


def test_it_is_never_chosen_without_the_package_and_a_gpu(bundle, monkeypatch):
    manifest = type(bundle.manifest)()
    for name in ("tensorrt", "ort-x86-avx2", "ort-arm64"):
        manifest.targets.add(name=name)
    monkeypatch.setattr(target_module, "gpu_present", lambda: False)
    with pytest.raises(BundleError, match=r"no target for this machine .* it has: tensorrt"):
        choose_target(bundle)
    both = Bundle.open(bundle.path)
    both.manifest = manifest
    assert choose_target(both).startswith("ort")
    monkeypatch.setattr(target_module, "_installed", lambda runtime: True)
    assert choose_target(both).startswith("ort")
    with pytest.raises(BundleError, match="needs an NVIDIA GPU") as said:
        EngineFactory(bundle, "tensorrt")
    assert said.value.code == "no-gpu"


def test_naming_it_without_the_package_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setattr(trt_api, "PACKAGES", ("no_such_tensorrt",))
    with pytest.raises(
        BundleError, match=r"TensorRT, which is not installed\. On a Jetson .* pip install tensorrt-cu12"
    ) as said:
        EngineFactory(bundle, "tensorrt")
    assert said.value.code == "no-runtime"


def test_a_runtime_that_only_runs_engines_is_not_enough(monkeypatch):
    monkeypatch.setattr(trt_api.importlib, "import_module", lambda name: object())
    with pytest.raises(BundleError, match="lean or dispatch"):
        trt_api.load_tensorrt()


def _why_not() -> str:
    if not trt_api.tensorrt_installed():
        return "TensorRT is not installed here: nothing of this target has run on a GPU"
    return "" if cuda_module.gpu_present() else "no NVIDIA GPU here: nothing of this target has run on one"


@pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "runs")
def test_a_real_engine_answers_as_the_file_at_every_state(bundle, trial, tmp_path):
    factory = EngineFactory(bundle, "tensorrt", cache=tmp_path)  # its proof is the first half of this test
    x = bundle.preprocess.apply(trial)
    for seed in range(3):
        states = distant(bundle.norms, seed)
        wanted = file_answers(bundle, x, states)
        ours = factory.build(ServingState(states)).run(x)
        assert np.sqrt(np.mean((ours - wanted) ** 2)) <= engine_module.FILE_APART * wanted.std()
        moments = factory.build_taps(ServingState(states)).run(x)
        wanted = file_answers(bundle, x, states, TAPS)
        assert np.sqrt(np.mean((moments - wanted) ** 2)) <= engine_module.FILE_APART * wanted.std()


def test_the_recipe_survives_its_file():
    recipe = BuildRecipe(3, (), {"x": 16})
    assert BuildRecipe.from_json(recipe.to_json(), "build.json") == recipe
