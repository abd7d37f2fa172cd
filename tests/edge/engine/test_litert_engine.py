"""The LiteRT engine: ONNX Runtime's answers at every state, swapped under load, and one sentence for whatever is wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cloud_double import RELEASE_KEY, Authority, Cloud
from daemon_process import DaemonProcess
from small_nets import shifted

from edge.engine import EngineFactory, EngineSlot, choose_target
from edge.engine import target as target_module
from edge.engine.pictures import Scratch
from edge.serving import ServingState
from refold import NormState, Release, write_bundle
from refold.errors import BundleError, GateError, InputError, NormStateError
from refold.release import seal
from refold.tflite import TfliteFile
from refold.v1 import adaptation_pb2 as pb

ROOT = Path(__file__).parents[3]
STEP = 1e-3  # of the logits' spread: the last layer's 16-bit codes


def close(a: np.ndarray, b: np.ndarray, part: float = STEP) -> bool:
    return bool(np.abs(a - b).max() <= part * b.std())


def disturbed(table, seed):
    from edge.engine.preoptimised import disturbed

    return disturbed(table, seed)


@pytest.mark.parametrize("seed", range(4))
def test_every_state_gives_onnx_runtimes_answers(both, litert, ort, images, seed):
    x, state = both.preprocess.apply(images), ServingState(shifted(both.norms, seed), release_version=seed)
    ours, theirs = litert.build(state), ort.build(state)
    assert close(ours.run(x), theirs.run(x)) and ours.serving.release_version == seed
    assert not close(ours.run(x), litert.build(ServingState()).run(x), 0.1)


@pytest.mark.parametrize("seed", range(3))
def test_activation_scales_travel_too(both, litert, ort, images, seed):
    """The second layer's codes move by a few steps where 32-bit multipliers round another way: not by more."""
    state = ServingState(*disturbed(both.norms, seed))
    x = both.preprocess.apply(images)
    assert close(litert.build(state).run(x), ort.build(state).run(x), 0.03)


def test_zero_points_move_and_clamps_stay(both, litert, ort, images):
    """With another zero point a ReLU is no longer the end of the codes' range: the fused one has to do its work."""
    moved = tuple(replace(a, zero_point=a.zero_point + 30) for a in both.norms.activations)
    x = both.preprocess.apply(images)
    assert close(litert.build(ServingState({}, moved)).run(x), ort.build(ServingState({}, moved)).run(x), 0.03)


def test_pictures_and_floats_are_answered_alike(both, litert, images):
    state = ServingState(*disturbed(both.norms, 1))
    engine, x = litert.build(state), both.preprocess.apply(images)
    truth = engine.run(x)
    np.testing.assert_array_equal(engine.run_pictures(images), truth)
    scratch = Scratch(*images.shape[1:3])
    np.testing.assert_array_equal(engine.pictures.run(images[3], scratch), truth[3:4])
    for wrong in (x[:, :, :8], x.astype(np.float64), x[0], x[:0]):
        with pytest.raises(InputError, match="does not take an input of shape"):
            engine.run(wrong)
    with pytest.raises(InputError):
        engine.run_pictures(images[:, :8])


def test_taps_are_those_of_onnx_runtime(both, litert, ort, images):
    state, x = ServingState(shifted(both.norms, 2)), both.preprocess.apply(images)
    ours, theirs = litert.build_taps(state).run(x), ort.build_taps(state).run(x)
    assert ours.shape == (len(x), 2, sum(s.channels for s in both.norms.norms)) and litert.has_taps
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())
    assert np.abs(ours - litert.build_taps(ServingState()).run(x)).max() > 0.1


def test_every_layer_runs_in_integers(litert):
    assert litert.integer_layers == litert.expected_integer_layers == 7


def test_swaps_under_load_give_exactly_old_or_new(both, litert, images):
    x = both.preprocess.apply(images[:1])
    engines = [litert.build(ServingState(shifted(both.norms, s), release_version=s)) for s in range(2)]
    answers = [e.run(x) for e in engines]
    assert not np.array_equal(*answers)
    slot, stop, wrong, served = EngineSlot(engines[0]), threading.Event(), [], []

    def load():
        while not stop.is_set():
            engine = slot.current
            version = engine.serving.release_version
            served.append(version)
            if not np.array_equal(engine.run(x), answers[version]):
                wrong.append(engine.serving)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for t in threads:
        t.start()
    for i in range(60):
        new = (i + 1) % 2
        slot.swap(litert.build(ServingState(shifted(both.norms, new), release_version=new)))
    stop.set()
    for t in threads:
        t.join()
    assert not wrong and slot.swaps == 60 and set(served) == {0, 1}


def test_the_canary_and_the_norm_table_refuse_what_makes_no_sense(both, litert):
    litert.canary(litert.build(ServingState(shifted(both.norms, 1))))
    dead = {
        s.name: NormState(s.exported.gamma, s.exported.beta - 1e3, s.exported.mean, s.exported.variance)
        for s in both.norms.norms
    }
    with pytest.raises(GateError, match="same answer"):
        litert.canary(litert.build(ServingState(dead)))
    with pytest.raises(NormStateError, match="another model"):
        litert.build(ServingState({both.norms.norms[0].name: NormState([1.0], [0.0], [0.0], [1.0])}))


# What is wrong with a file ---------------------------------------------------------------------------------------------------


def rewritten(both, tmp_path, name, content):
    parts = {p.path: both.read(p.path) for p in both.parts}
    parts[f"targets/litert/{name}"] = content
    return write_bundle(tmp_path / "other.refold", both.manifest, parts)


def test_damaged_files_are_refused(both, tmp_path):
    model = both.read("targets/litert/model.tflite")
    for content in (b"", b"\xff" * 64, model[:500], model[: len(model) // 2], b"\0" * 4 + model[4:], model[:8]):
        with pytest.raises(BundleError, match="not readable as TFLite"):
            EngineFactory(rewritten(both, tmp_path, "model.tflite", content), "litert")


def test_a_cut_or_scribbled_file_never_leads_out_of_itself(both):
    """Every single offset may be wrong: the reader says so, or reads something else, but nothing worse."""
    model = both.read("targets/litert/model.tflite")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(model)
        for at in rng.integers(0, len(model), 8):
            broken[at] = rng.integers(256)
        at = int(rng.integers(0, len(model) // 4)) * 4
        broken[at : at + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
        try:
            TfliteFile(bytes(broken[: rng.integers(16, len(model) + 1)]))
        except BundleError as e:
            refused += e.code == "damaged"
    assert refused > 100


def test_a_file_of_another_net(both, tmp_path):
    model = both.read("targets/litert/model.tflite")
    other = model.replace(b'"a.1.bias"', b'"z.1.bias"')
    with pytest.raises(BundleError, match="disagree about"):
        EngineFactory(rewritten(both, tmp_path, "model.tflite", other), "litert")
    swapped = model.replace(b"refold.adaptable", b"refold.adaptible")
    with pytest.raises(BundleError, match="disagree about"):
        EngineFactory(rewritten(both, tmp_path, "model.tflite", swapped), "litert")


@pytest.mark.parametrize(
    "told", [b"[1,2]", b'{"a":3}', b'{"a":[["scale",Infinity]]}', b'{"a":[["scale",99999]]}', b"{", b"\xff"]
)
def test_a_list_of_carriers_that_is_none_is_refused(both, told):
    model = both.read("targets/litert/model.tflite")
    start = model.index(b'{"a.0.bias"') if b'{"a.0.bias"' in model else model.index(b'{"a.1.bias"')
    end = model.index(b"}", start) + 1
    with pytest.raises(BundleError, match="not readable as TFLite"):
        TfliteFile(model[:start] + told.ljust(end - start) + model[end:])


def test_a_file_that_takes_floats(both, tmp_path):
    """The first layer of this net runs in float: nothing is quantised on the way in."""
    import export_nets

    from export.pictures import Pictures
    from export.pipeline import Options, make_recipe
    from export.runtimes.litert import infer
    from export.targets import TARGETS, write
    from refold.codec import table_to_pb

    pictures = export_nets.pictures(16)
    recipe = make_recipe(
        export_nets.make("unary"), both.preprocess, Pictures(pictures, None), Options(("litert",), observer="minmax")
    )
    artefact = write(TARGETS["litert"], recipe.model)
    manifest = type(both.manifest)()
    manifest.CopyFrom(both.manifest)
    manifest.norms.CopyFrom(table_to_pb(recipe.model.table))
    del manifest.targets[0], manifest.layers[:]
    parts = {p.path: both.read(p.path) for p in both.parts if "ort" not in p.path}
    parts |= {"targets/litert/model.tflite": artefact.model, "targets/litert/taps.tflite": artefact.taps}
    factory = EngineFactory(write_bundle(tmp_path / "floats.refold", manifest, parts))
    engine, x = factory.build(ServingState()), both.preprocess.apply(pictures[:4])
    assert factory.target == "litert" and engine.pictures is None
    np.testing.assert_array_equal(engine.run(x), infer(artefact.model, x))
    np.testing.assert_array_equal(engine.run_pictures(pictures[:4]), engine.run(x))
    np.testing.assert_array_equal(factory.build_taps(ServingState()).run(x), infer(artefact.taps, x))
    factory.canary(engine)


def test_a_model_litert_refuses(both, tmp_path):
    """A convolution whose weights have another number of channels than its input: sound as a file, refused by LiteRT."""
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    model = schema.ModelT.InitFromPackedBuf(bytearray(both.read("targets/litert/model.tflite")))
    graph = model.subgraphs[0]
    weight = graph.tensors[graph.operators[0].inputs[1]]
    weight.shape = np.asarray([weight.shape[0], weight.shape[1], weight.shape[3], weight.shape[2] + 4], np.int32)
    builder = Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    factory = EngineFactory(rewritten(both, tmp_path, "model.tflite", bytes(builder.Output())), "litert")
    with pytest.raises(BundleError, match="does not open the bundle's model"):
        factory.build(ServingState())


def test_a_bundle_without_taps_or_without_this_target(both, litert, tmp_path):
    manifest = type(both.manifest)()
    manifest.CopyFrom(both.manifest)
    manifest.targets[1].taps = ""
    bare = write_bundle(tmp_path / "bare.refold", manifest, {p.path: both.read(p.path) for p in both.parts})
    with pytest.raises(BundleError, match="no tap model"):
        EngineFactory(bare, "litert").build_taps(ServingState())
    del manifest.targets[1]
    only = write_bundle(tmp_path / "only.refold", manifest, {p.path: both.read(p.path) for p in both.parts})
    with pytest.raises(BundleError, match="no target 'litert'; it has: ort-x86-avx2"):
        EngineFactory(only, "litert")


def test_a_runtime_that_is_not_installed_is_said_and_the_other_taken(both, monkeypatch):
    assert choose_target(both).startswith("ort")
    monkeypatch.setattr(target_module, "_installed", lambda runtime: runtime != "litert")
    with pytest.raises(
        BundleError, match=r"needs ai_edge_litert, which is not installed: pip install 'refold\[litert\]'"
    ) as said:
        EngineFactory(both, "litert")
    assert said.value.exit_code == 5 and said.value.code == "no-runtime"
    monkeypatch.setattr(target_module, "_installed", lambda runtime: runtime == "litert")
    assert choose_target(both) == "litert" and EngineFactory(both).target == "litert"
    assert choose_target(both, runtime="ort") == "ort-x86-avx2"
    monkeypatch.setattr(target_module, "_installed", lambda runtime: False)
    with pytest.raises(BundleError, match="needs onnxruntime"):
        EngineFactory(both)


def test_nothing_of_litert_is_imported_until_it_is_used(both):
    program = f"""
import sys
import edge.daemon
from edge.engine import EngineFactory
from edge.serving import ServingState
from refold import Bundle
bundle = Bundle.open({str(both.path)!r})
assert "onnxruntime" not in sys.modules and "ai_edge_litert" not in sys.modules
EngineFactory(bundle, "ort-x86-avx2").build(ServingState())
assert "ai_edge_litert" not in sys.modules
EngineFactory(bundle, "litert").build(ServingState())
assert "ai_edge_litert" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


# The daemon ------------------------------------------------------------------------------------------------------------------


def test_a_device_on_litert_follows_releases_survives_a_kill_and_rolls_back(both, litert, images, tmp_path):
    """The daemon's own way: TLS, a signed release, canary, swap; then SIGKILL, restart, roll-back."""
    authority, data = Authority(), tmp_path / "data"
    authority.identity().save(data / "identity")
    np.savez(tmp_path / "stream.npz", images=images)
    cloud = Cloud(authority)
    cloud.start()
    states = {v: shifted(both.norms, v) for v in (1, 2)}
    releases = {v: seal(Release(both.digest, "roof", v, state), RELEASE_KEY) for v, state in states.items()}
    wanted = {"release": 0}

    def poll(request):
        release = wanted["release"]
        if release and request.installed_version != release:
            return pb.PollReleaseResponse(release=releases[release])
        return None

    cloud.answer_poll = poll
    config = tmp_path / "edge.toml"
    config.write_text(
        f'bundle = "{both.path}"\nsource.path = "stream.npz"\nsource.loop = true\nsource.fps = 200\n'
        "engine.target = 'litert'\n[adapt]\nenabled = false\n[metrics]\nstatus_s = 0.1\n"
        f"[cloud]\naddress = 'localhost:{cloud.port}'\nheartbeat_s = 0.5\npoll_wait_s = 1.0\nretry_first_s = 0.2\n"
    )
    expected = {v: litert.build(ServingState(s)).run_pictures(images).argmax(1) for v, s in states.items()}

    def agree(line):
        return line["class"] == expected[line["release_version"]][line["frame"] % len(images)]

    try:
        with DaemonProcess("--config", config, data=data) as daemon:
            for version in (1, 2):
                wanted["release"] = version
                daemon.until(lambda v=version: daemon.version() == v)
            daemon.until(lambda: sum(line["release_version"] == 2 for line in daemon.lines()) > len(images))
            assert daemon.status()["target"] == "litert"
            assert daemon.end(signal.SIGKILL) == -9
        assert all(agree(line) for line in daemon.lines() if line["release_version"])
        with DaemonProcess("--config", config, data=data) as daemon:
            daemon.until(lambda: daemon.status().get("metrics", {}).get("uptime_s", 99) < 30)
            daemon.until(lambda: daemon.version() == 2)
            wanted["release"] = 0
            (data / "rollback.request").write_text("by hand")
            daemon.until(lambda: daemon.version() == 1)
            assert daemon.end() == 0
        assert "Traceback" not in daemon.said() and daemon.status()["metrics"]["frames_lost"] == 0
    finally:
        cloud.stop()


def test_the_daemon_adapts_by_itself_on_litert(both, images, tmp_path):
    from edge.daemon import Daemon
    from edge.settings import load_settings

    np.savez(tmp_path / "stream.npz", images=np.concatenate([images // 3 + k for k in range(12)]))
    flags = {
        "bundle": str(both.path), "data": str(tmp_path / "data"), "mode": "inline", "engine": {"target": "litert"},
        "source": {"path": str(tmp_path / "stream.npz")},
    }  # fmt: skip
    with Daemon(load_settings(None, flags, {})) as daemon:
        assert daemon.run() == 12 * len(images)
        assert daemon.slot.swaps > 0 and daemon.slot.current.serving.overlay
        assert daemon.adaptation.states_refused == 0


def test_the_command_line_serves_and_says_what_is_missing(both, tmp_path, images):
    np.savez(tmp_path / "stream.npz", images=images)
    with DaemonProcess(
        "--bundle", both.path, "--source", tmp_path / "stream.npz", "--target", "litert", "--json", data=tmp_path / "data"
    ) as daemon:
        assert daemon.wait() == 0, daemon.said()
    assert len(daemon.lines()) == len(images)
    shutil.rmtree(tmp_path / "data")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    program = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'ai_edge_litert' else real(name, *a)\n"
        "from refold.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "edge", "run", "--bundle", both.path, "--target", "litert", "--data", hidden]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 5 and "pip install 'refold[litert]'" in done.stderr and "Traceback" not in done.stderr
