"""What a training hands over: codes that compute what was trained, in the interpreter, in ONNX Runtime, in the student."""

from __future__ import annotations

import dataclasses
import io

import export_nets
import numpy as np
import onnx
import pytest
import torch
from fixed_point_nets import QUICK, trainer_of

from export.engines import infer, session
from export.fixed_point.deliver import deliver, sizes
from export.fixed_point.number import FixedPoint
from export.fixed_point.power_of_two import scale_errors, shifts
from export.fixed_point.settings import for_integers, in_float32
from export.fixed_point.train import Trainer
from export.given import Given
from export.interpret import run, simulated
from export.quantise import IntegerModel, dequantised_parameters
from export.student import student_program
from export.targets import TARGETS, write
from refold.errors import ModelError
from refold.norms import NormTable

X = export_nets.PREPROCESS.apply(export_nets.pictures(24, seed=9))


def interpreted(delivery) -> np.ndarray:
    at = simulated(delivery.given.scales)
    with torch.no_grad():
        return run(
            delivery.graph, torch.from_numpy(X), dequantised_parameters(delivery.graph, delivery.given.weights), at
        ).numpy()


def in_runtime(model: IntegerModel, target: str) -> np.ndarray:
    config = TARGETS[target]
    return infer(session(write(config, model, embedded=True).model, exact=config.qmax > 64), X)


def test_dequantised_codes_are_the_trained_network(trained):
    delivery = deliver(trained.network)
    assert isinstance(delivery.given, Given) and len(delivery.given.weights) == 7 and not delivery.shortened
    for codes in delivery.given.weights.values():
        assert codes.codes.dtype == np.int8 and codes.scale.dtype == np.float32 and codes.bits <= 8
        assert np.log2(codes.scale[0]) % 1 == 0 and (codes.scale == codes.scale[0]).all()
        assert np.abs(codes.codes.astype(int)).max() <= 2 ** (codes.bits - 1) - 1
    for scale in delivery.given.scales.values():
        assert np.log2(scale.scale) % 1 == 0 and scale.zero_point in (0, 128) and scale.levels == 256
    own = trained.network.evaluate(torch.from_numpy(X)).numpy()
    assert np.array_equal(interpreted(delivery), own)
    assert set(delivery.given.constants) == set(trained.network.captured.constants) and not delivery.keep_float
    assert all(v is delivery.captured.constants[n] for n, v in delivery.given.constants.items())


@pytest.mark.parametrize("net", ["vgg", "dense", "squeeze", "vit", "inverted"])
def test_other_families_too(net):
    trainer = trainer_of(for_integers(**{**QUICK, "epochs": 1}, learning_rate=0.01), net, count=32)
    trainer.run()
    delivery = deliver(trainer.network)
    own = trainer.network.evaluate(torch.from_numpy(X)).numpy()
    assert np.array_equal(interpreted(delivery), own)
    spread = float((own - own.mean(0)).std())
    apart = in_runtime(delivery.integers(), "ort-x86-vnni") - own
    assert float(np.sqrt(np.mean(apart**2))) < 0.1 * spread


def test_the_engine_and_the_student_are_the_trained_network(trained):
    model = deliver(trained.network).integers()
    own = trained.network.evaluate(torch.from_numpy(X)).numpy()
    engine = in_runtime(model, "ort-x86-vnni")
    assert (engine.argmax(1) == own.argmax(1)).all() and np.abs(engine - own).max() < 0.05 * own.std()
    student = torch.export.load(io.BytesIO(student_program(model))).module()(torch.from_numpy(X)).detach().numpy()
    assert np.abs(student - engine).max() <= np.abs(engine).max() / 128


def test_seven_bits_lose_one_bit_of_fraction_and_say_what_it_changed(trained):
    delivery = deliver(trained.network, 64)
    assert set(delivery.shortened) <= {n.name for n in delivery.graph.nodes} and delivery.shortened
    for node in delivery.graph.nodes:
        if node.output not in delivery.given.weights:
            continue
        codes, form = delivery.given.weights[node.output], trained.network.forms[node.parameters["weight"]]
        assert np.abs(codes.codes.astype(int)).max() <= 64
        lost = node.name in delivery.shortened
        assert codes.scale[0] == form.step * (2 if lost else 1) and codes.bits == form.word - lost
        apart = codes.dequantised() - delivery.graph.constants[node.parameters["weight"]]
        assert np.abs(apart).max() <= (form.step if lost else 0.0)
    assert all(0 < e < 0.2 for e in delivery.shortened.values())
    own = trained.network.evaluate(torch.from_numpy(X)).numpy()
    apart = in_runtime(delivery.integers(), "ort-x86-avx2") - own
    assert 0 < float(np.sqrt(np.mean(apart**2))) < 0.25 * own.std()


def test_training_in_seven_bits_loses_nothing_there():
    trainer = trainer_of(for_integers(7, **{**QUICK, "epochs": 1}), count=64)
    trainer.run()
    delivery = deliver(trainer.network, 64)
    assert not delivery.shortened
    assert np.array_equal(interpreted(delivery), trainer.network.evaluate(torch.from_numpy(X)).numpy())


def test_long_words_become_float_layers_with_sixteen_bit_weights(trained_as_published):
    net = trained_as_published.network
    delivery = deliver(net)
    assert not delivery.given.weights and not delivery.given.scales  # the paper's words never have fewer than 12 bits
    long = {n for n, f in net.forms.items() if f.word > 16}
    assert set(delivery.stored) == set(net.weights) - long
    for name, stored in delivery.stored.items():
        assert stored.codes.dtype == np.int16
        assert np.array_equal(stored.codes * np.float32(stored.step), net.quantised[name].detach().numpy())
    own = net.evaluate(torch.from_numpy(X)).numpy()
    model = delivery.integers()
    engine = in_runtime(model, "ort-x86-avx2")
    assert np.abs(engine - interpreted(delivery)).max() < 1e-4 * np.abs(own).max()
    # An engine's float activations are not rounded where training rounded them to 12 bits or more.
    assert (engine.argmax(1) == own.argmax(1)).mean() > 0.8


def test_sixteen_bit_weights_are_in_the_file_and_float_once_it_is_loaded(trained_as_published, tmp_path):
    model = deliver(trained_as_published.network).integers()
    content = write(TARGETS["ort-x86-avx2"], model, embedded=True).model
    sixteen = [t.name for t in onnx.load_from_string(content).graph.initializer if t.data_type == onnx.TensorProto.INT16]
    assert sixteen == [f"{n}.codes" for n in model.stored]
    session(content, optimised=tmp_path / "o.onnx")
    kinds = {n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node}
    assert kinds & {"Conv", "FusedConv"} and not kinds & {"QLinearConv", "DequantizeLinear", "Cast"}
    plain = write(TARGETS["ort-x86-avx2"], dataclasses.replace(model, stored={}), embedded=True).model
    assert len(plain) - len(content) > 1.5 * sum(w.codes.size for w in model.stored.values())
    assert np.array_equal(infer(session(plain), X), infer(session(content), X))


def test_mixed_words_keep_the_short_ones_in_integers():
    trainer = trainer_of(for_integers(**{**QUICK, "epochs": 1}), count=32)
    trainer.run()
    net = trainer.network
    net.forms["a.0.weight"] = FixedPoint(12, 10, narrow=True)
    net.forms["c.0.weight"] = FixedPoint(20, 16, narrow=True)
    delivery = deliver(net)
    assert len(delivery.given.weights) == 5 and set(delivery.stored) == {"a.0.weight"}
    kept = {n.name for n in delivery.graph.nodes if n.attributes.get("keep_float")}
    assert kept == set(delivery.keep_float) == {"a.0", "c.0"}
    engine = in_runtime(delivery.integers(), "ort-x86-vnni")
    own = net.evaluate(torch.from_numpy(X)).numpy()
    assert np.abs(engine - own).max() < 0.1 * own.std()


def test_zeros_deflate(trained):
    told = sizes(deliver(trained.network))
    assert told["float32"] == 4 * told["delivered"] == 4 * sum(trained.sizes.values())
    assert told["delivered_deflated"] < 0.3 * told["float32_deflated"] or told["delivered_deflated"] < told["delivered"]


def errors_of(table: NormTable) -> dict[str, float]:
    return {e.site: e.largest for e in scale_errors(table)}


def test_folded_scales_are_exact_unless_asked(trained):
    assert set(errors_of(deliver(trained.network).integers().table).values()) == {0.0} or all(
        e < 1e-7 for e in errors_of(deliver(trained.network).integers().table).values()
    )


def test_powers_of_two_are_shifts_and_their_error_is_told(trained):
    model = deliver(trained.network).integers(power_of_two=True)
    told = scale_errors(model.table)
    assert len(told) == 7 and all(0 <= e.rms <= e.largest <= 1 / 3 + 1e-7 for e in told)
    assert max(e.largest for e in told) > 0.1
    scales = {a.tensor: a.scale for a in model.table.activations}
    for node in model.graph.nodes:
        site = model.sites.get(node.output)
        if site is not None and node.output in scales:
            bits = shifts(site, site.exported, scales[site.input_tensor], scales[node.output])
            assert bits.shape == (site.channels,) and bits.dtype == np.int64 and -40 < bits.min() <= bits.max() < 10
    with pytest.raises(ModelError, match="no power of two"):
        exact = deliver(trained.network).integers().table.sites[0]
        shifts(exact, exact.exported, 1.0, 1.0)
    engine = in_runtime(model, "ort-x86-vnni")
    student = torch.export.load(io.BytesIO(student_program(model))).module()(torch.from_numpy(X)).detach().numpy()
    assert np.abs(student - engine).max() <= np.abs(engine).max() / 64


def test_a_training_that_sees_the_shifts_computes_them(trained):
    trainer = trainer_of(for_integers(**QUICK, power_of_two=True))
    trainer.run()
    own = trainer.network.evaluate(torch.from_numpy(X)).numpy()
    engine = in_runtime(deliver(trainer.network).integers(power_of_two=True), "ort-x86-vnni")
    assert np.abs(engine - own).max() < 0.05 * own.std()
    unaware = trained.network.evaluate(torch.from_numpy(X)).numpy()
    surprised = in_runtime(deliver(trained.network).integers(power_of_two=True), "ort-x86-vnni")
    assert np.abs(surprised - unaware).max() > 2 * np.abs(engine - own).max()


def test_float32_has_nothing_to_deliver():
    trainer: Trainer = trainer_of(in_float32(for_integers(**QUICK)), count=8)
    with pytest.raises(ModelError, match="float32"):
        deliver(trainer.network)
    with pytest.raises(ModelError, match="never seen"):
        deliver(trainer_of(for_integers(**QUICK), count=8).network)
