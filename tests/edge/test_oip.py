"""The Open Inference Protocol: an unmodified client gets exactly the old or the new engine's answer, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from cloud_double import RELEASE_KEY, Authority, Cloud
from daemon_process import DaemonProcess
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from small_nets import images, shifted

from edge.engine import EngineSlot
from edge.inference import Handlers, InferenceServer
from edge.serving import ServingState
from edge.settings import Inference
from refold import Release
from refold.errors import UsageError
from refold.inference import open_inference_pb2 as pb
from refold.inference import open_inference_pb2_grpc as service
from refold.release import seal
from refold.v1 import adaptation_pb2

CLIENT = Path(__file__).with_name("triton_client.py")


@pytest.fixture
def slot(factory):
    return EngineSlot(factory.build(ServingState()))


@pytest.fixture
def handlers(bundle, slot):
    return Handlers(bundle, slot, max_batch=8)


@pytest.fixture
def server(handlers):
    server = InferenceServer(handlers, Inference(port=0, max_mb=1))
    yield server
    server.close()


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield service.GRPCInferenceServiceStub(channel)


@pytest.fixture
def stream(tmp_path):
    np.savez(tmp_path / "images.npz", images=images(16, 16, seed=6))
    return tmp_path / "images.npz"


class Triton:
    """The client's process; what it says goes to a file, which unlike a pipe is never full."""

    def __init__(self, out, *arguments):
        self.out = out
        with out.open("w") as f:
            self.process = subprocess.Popen([sys.executable, CLIENT, *map(str, arguments)], stdout=f)

    @property
    def running(self):
        return self.process.poll() is None

    def answers(self, seconds=60):
        assert self.process.wait(seconds) == 0
        return json.loads(self.out.read_text())


@pytest.fixture
def triton(tmp_path):
    started = []

    def start(*arguments):
        started.append(Triton(tmp_path / "triton.json", *arguments))
        return started[-1]

    yield start
    for client in started:
        client.process.kill()
        client.process.wait()


def test_an_unmodified_client_while_engines_are_swapped(bundle, factory, slot, server, stream, triton):
    states = {v: ServingState(shifted(bundle.norms, v) if v else {}, release_version=v) for v in (0, 1)}
    pictures = np.load(stream)["images"]
    truth = {v: np.concatenate([factory.build(s).run(bundle.preprocess.apply(p)) for p in pictures]) for v, s in states.items()}
    client = triton(f"localhost:{server.port}", "residual", stream, 600)
    swaps = 0
    while client.running:
        swaps += 1
        slot.swap(factory.build(states[swaps % 2]))
        time.sleep(0.002)
    told = client.answers()
    assert swaps > 20 and told["live"] and told["ready"]
    assert {a["version"] for a in told["answers"]} == {0, 1}
    for i, answer in enumerate(told["answers"]):
        np.testing.assert_array_equal(np.float32(answer["logits"]), truth[answer["version"]][i % 16])
    assert told["metadata"]["name"] == "residual" and told["metadata"]["outputs"][0]["shape"] == ["-1", "5"]
    assert told["server"]["name"] == "refold" and np.shape(told["batch"]) == (3, 5)
    small, other, kind, *asked = told["errors"]
    assert "INVALID_ARGUMENT" in small and "[N, 16, 16, 3]" in small
    assert "NOT_FOUND" in other and "'residual'" in other and "INVALID_ARGUMENT" in kind
    names = ["'classification'", "'priority'", "'timeout'", "'sequence_id'", "'mine'", "'shared_memory_region'", "Version 77"]
    assert len(asked) == len(names)
    for error, name in zip(asked, names, strict=True):
        assert name in error and ("NOT_FOUND" if name == "Version 77" else "INVALID_ARGUMENT") in error


def test_a_daemon_answers_and_looks_at_requests_like_frames(bundle, stream, tmp_path, triton):
    with DaemonProcess("--bundle", bundle.path, "--oip-port", "0", "--selector", "budget", data=tmp_path / "data") as daemon:
        daemon.until(lambda: daemon.status().get("inference_port"))
        client = triton(f"localhost:{daemon.status()['inference_port']}", "residual", stream, 40)
        assert len(client.answers()["answers"]) == 40
        daemon.until(lambda: len(daemon.lines()) == 43)
        assert daemon.end() == 0
    assert daemon.lines()[0]["source"] == "request 0[0]" and daemon.status()["metrics"]["frames"] == 43
    assert "Traceback" not in daemon.said()


def test_an_unmodified_client_of_the_daemon_while_releases_are_applied(bundle, factory, stream, tmp_path, triton):
    """Signed releases come over TLS, are verified, written, tried and swapped in under the client's requests."""
    authority, data = Authority(), tmp_path / "data"
    authority.identity().save(data / "identity")
    states = {v: shifted(bundle.norms, v) if v else {} for v in range(6)}
    releases = {v: seal(Release(bundle.digest, "roof", v, states[v]), RELEASE_KEY) for v in states if v}
    pictures = np.load(stream)["images"]
    truth = {
        v: np.concatenate([factory.build(ServingState(s)).run(bundle.preprocess.apply(p)) for p in pictures])
        for v, s in states.items()
    }
    cloud, newest = Cloud(authority), [0]

    def poll(request):
        following = request.installed_version + 1
        return adaptation_pb2.PollReleaseResponse(release=releases[following]) if following <= newest[0] else None

    cloud.answer_poll = poll
    cloud.start()
    config = tmp_path / "edge.toml"
    config.write_text(
        f'bundle = "{bundle.path}"\nadapt.enabled = false\ninference.port = 0\n'
        f"[cloud]\naddress = 'localhost:{cloud.port}'\npoll_wait_s = 0.5\nlinger_s = 0.0\n"
    )
    try:
        with DaemonProcess("--config", config, data=data) as daemon:
            daemon.until(lambda: daemon.status().get("inference_port"))
            client = triton(f"localhost:{daemon.status()['inference_port']}", "residual", stream, 3000)
            for version in (1, 2, 3, 4, 5):
                newest[0] = version
                daemon.until(lambda v=version: (daemon.lines() or [{"release_version": 0}])[-1]["release_version"] == v)
            answers = client.answers()["answers"]
            assert daemon.end() == 0
    finally:
        cloud.stop()
    versions = [a["version"] for a in answers]
    assert versions == sorted(versions) and len(set(versions)) >= 4
    for i, answer in enumerate(answers):
        np.testing.assert_array_equal(np.float32(answer["logits"]), truth[answer["version"]][i % 16])
    assert daemon.status()["metrics"]["frames_lost"] == 0 and "Traceback" not in daemon.said()


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(handlers, tmp_path, stream, triton, mutual):
    authority = Authority()
    key, certificate = authority.server()
    for name, content in {"key": key, "cert": certificate, "ca": authority.pem}.items():
        (tmp_path / name).write_bytes(content)
    settings = Inference(
        port=0, certificate=str(tmp_path / "cert"), key=str(tmp_path / "key"), client_ca=str(tmp_path / "ca") if mutual else ""
    )
    server = InferenceServer(handlers, settings)
    try:
        if not mutual:
            client = triton(f"localhost:{server.port}", "residual", stream, 3, tmp_path / "ca")
            assert len(client.answers()["answers"]) == 3
        identity = authority.identity()
        for known in (True, False):
            pair = (identity.key_pem, identity.certificate_pem) if known else (None, None)
            with grpc.secure_channel(f"localhost:{server.port}", grpc.ssl_channel_credentials(authority.pem, *pair)) as channel:
                live = service.GRPCInferenceServiceStub(channel).ServerLive
                if mutual and not known:
                    with pytest.raises(grpc.RpcError):
                        live(pb.ServerLiveRequest(), timeout=10)
                else:
                    assert live(pb.ServerLiveRequest(), timeout=10).live
    finally:
        server.close()
    with pytest.raises(UsageError, match="TLS file"):
        InferenceServer(handlers, Inference(port=0, certificate="nothing", key=str(tmp_path / "key")))


def test_health_and_reflection(server, handlers):
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        assert "inference.GRPCInferenceService" in {s.name for s in answer.list_services_response.service}
    handlers.ready = False
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub = service.GRPCInferenceServiceStub(channel)
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert not stub.ModelReady(pb.ModelReadyRequest(name="residual")).ready


def request(shape=(2, 16, 16, 3), datatype="UINT8", name="input", model="residual", **fields):
    asked = pb.ModelInferRequest(model_name=model, **fields)
    asked.inputs.add(name=name, datatype=datatype, shape=shape)
    return asked


def test_typed_and_raw_contents_of_both_types_agree(bundle, slot, stub):
    pictures = images(2, 16, seed=3)
    x = bundle.preprocess.apply(pictures)
    truth = slot.current.run(x)
    asked = {}
    for form in ("u8 raw", "u8 typed", "f32 raw", "f32 typed"):
        kind, way = form.split()
        values = pictures if kind == "u8" else x
        asked[form] = request(values.shape, "UINT8" if kind == "u8" else "FP32")
        if way == "raw":
            asked[form].raw_input_contents.append(values.tobytes())
        elif kind == "u8":
            asked[form].inputs[0].contents.uint_contents.extend(values.ravel().tolist())
        else:
            asked[form].inputs[0].contents.fp32_contents.extend(values.ravel().tolist())
    for form, one in asked.items():
        answer = stub.ModelInfer(one)
        if form.endswith("raw"):
            logits = np.frombuffer(answer.raw_output_contents[0], np.float32)
        else:
            logits = np.float32(answer.outputs[0].contents.fp32_contents)
        np.testing.assert_array_equal(logits.reshape(answer.outputs[0].shape), truth, err_msg=form)
        assert answer.parameters["domain"].string_param == "" and not answer.parameters["overlay"].bool_param


def bad_requests():
    pixels = images(2, 16).tobytes()

    def raw(content, **k):
        asked = request(**k)
        asked.raw_input_contents.append(content)
        return asked

    both = raw(pixels)
    both.inputs[0].contents.uint_contents.append(1)
    two = raw(pixels)
    two.inputs.add(name="input", datatype="UINT8", shape=[1])
    bright = request((1, 16, 16, 3))
    bright.inputs[0].contents.uint_contents.extend([256] * 768)
    output = raw(pixels)
    output.outputs.add(name="scores")
    twice = raw(pixels)
    for _ in range(2):
        twice.outputs.add(name="logits")
    typed = request()
    typed.inputs[0].contents.uint_contents.extend([1] * 1536)
    typed.inputs[0].contents.int_contents.append(1)
    signed = request()
    signed.inputs[0].contents.int_contents.extend([1] * 1536)
    newer = pb.ModelInferRequest.FromString(raw(pixels).SerializeToString() + b"\x98\x06\x01")  # field 99
    second = raw(pixels)
    second.inputs.add(name="mask", datatype="UINT8", shape=[1])
    second.raw_input_contents.append(b"0")
    of_request, of_input, of_output, several = raw(pixels), raw(pixels), raw(pixels), raw(pixels)
    of_request.parameters["priority"].uint64_param = 1
    of_input.inputs[0].parameters["shared_memory_region"].string_param = "x"
    of_output.outputs.add(name="logits").parameters["classification"].int64_param = 2
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        several.parameters[name].bool_param = True
    nan = raw(np.full((1, 3, 16, 16), np.nan, np.float32).tobytes(), shape=(1, 3, 16, 16), datatype="FP32")
    code = grpc.StatusCode
    return [
        (raw(pixels, model="cat"), code.NOT_FOUND, "There is no model 'cat'"),
        (raw(pixels, model_version="9"), code.NOT_FOUND, "Version 9"),
        (raw(pixels, name="x"), code.INVALID_ARGUMENT, "one input, 'input'"),
        (raw(pixels, datatype="INT8"), code.INVALID_ARGUMENT, "INT8 is not served"),
        (raw(pixels, shape=(2, 8, 32, 3)), code.INVALID_ARGUMENT, "[N, 16, 16, 3]"),
        (raw(pixels, shape=(-2, 16, 16, 3)), code.INVALID_ARGUMENT, "is none"),
        (raw(pixels, shape=(2**40, 2**40, 2**40, 3)), code.INVALID_ARGUMENT, "wants"),
        (raw(pixels[:-1]), code.INVALID_ARGUMENT, "1535 values"),
        (raw(b"\0\0\0", shape=(1, 3, 16, 16), datatype="FP32"), code.INVALID_ARGUMENT, "within a number"),
        (raw(b"", shape=(0, 16, 16, 3)), code.INVALID_ARGUMENT, "N from 1 to 8"),
        (raw(pixels * 8, shape=(16, 16, 16, 3)), code.INVALID_ARGUMENT, "N from 1 to 8"),
        (both, code.INVALID_ARGUMENT, "both raw and typed"),
        (two, code.INVALID_ARGUMENT, "belong together"),
        (bright, code.INVALID_ARGUMENT, "value of 256"),
        (output, code.INVALID_ARGUMENT, "no output 'scores'"),
        (nan, code.INVALID_ARGUMENT, "not finite"),
        (twice, code.INVALID_ARGUMENT, "asked for 2 times"),
        (typed, code.INVALID_ARGUMENT, "not int_contents"),
        (signed, code.INVALID_ARGUMENT, "contents are uint_contents, not int_contents"),
        (newer, code.INVALID_ARGUMENT, "The request has a field 99"),
        (second, code.INVALID_ARGUMENT, "carries 'input', 'mask'"),
        (of_request, code.INVALID_ARGUMENT, "parameter 'priority'"),
        (of_input, code.INVALID_ARGUMENT, "parameter 'shared_memory_region'"),
        (of_output, code.INVALID_ARGUMENT, "Output 'logits' carries the parameter 'classification'"),
        (several, code.INVALID_ARGUMENT, "'sequence_end', 'sequence_id', 'sequence_start'"),
        (raw(bytes(3 * 2**20)), code.RESOURCE_EXHAUSTED, ""),
        (pb.ModelInferRequest(model_name="residual"), code.INVALID_ARGUMENT, "carries none"),
    ]


@pytest.mark.parametrize("case", range(len(bad_requests())))
def test_bad_requests_get_a_code_and_a_sentence(stub, case):
    asked, code, sentence = bad_requests()[case]
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(asked, timeout=20)
    assert refused.value.code() is code and sentence in refused.value.details()


def test_a_field_of_another_version_is_refused_by_every_call(stub):
    for call, kind in ((stub.ModelReady, pb.ModelReadyRequest), (stub.ModelMetadata, pb.ModelMetadataRequest)):
        with pytest.raises(grpc.RpcError) as refused:
            call(kind.FromString(kind(name="residual").SerializeToString() + b"\x98\x06\x01"), timeout=20)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "field 99" in refused.value.details()
    assert stub.ModelReady(pb.ModelReadyRequest(name="residual"), timeout=20).ready


def test_a_fault_inside_is_not_shown_to_the_client(handlers, stub, monkeypatch, caplog):
    monkeypatch.setattr(Handlers, "check_model", lambda *_: 1 / 0)
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelReady(pb.ModelReadyRequest(name="residual"))
    assert refused.value.code() is grpc.StatusCode.INTERNAL and "ZeroDivision" not in refused.value.details()
    assert refused.value.details().split()[-1].rstrip(".") in caplog.text


def test_a_taken_port_is_said(server, handlers):
    with pytest.raises(UsageError, match="is it taken"):
        InferenceServer(handlers, Inference(port=server.port))
