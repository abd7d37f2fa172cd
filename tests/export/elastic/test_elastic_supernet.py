"""The supernet computes what the integer engine computes, for any configuration of any network."""

from __future__ import annotations

import elastic_nets
import export_nets
import numpy as np
import pytest
import torch
from torch import nn

from export.capture import capture, program_of
from export.elastic.deliver import given_of
from export.elastic.frozen import Moments, freeze
from export.elastic.space import Space
from export.elastic.supernet import Supernet, batch_statistics
from export.engines import infer, session
from export.interpret import float_parameters, run, simulated
from export.operators import batch_norm
from export.pictures import Pictures
from export.pipeline import Options, make_recipe
from export.quantise import dequantised_parameters
from export.targets import write
from refold.errors import InputError, ModelError, UsageError

SMALL = Space((2, 4, 8), (2, 4, 8))


def supernet(name: str, space: Space = SMALL) -> tuple[Supernet, torch.Tensor, nn.Module]:
    model = export_nets.make(name)
    program = program_of(model, 16, 16)
    x = export_nets.PREPROCESS.apply(export_nets.pictures(24))
    net = Supernet.build(capture(program, 16, 16), space, program.graph_signature.parameters, x)
    return net, torch.from_numpy(x), model


@pytest.mark.parametrize("name", ["residual", "inverted", "vit", "shuffle"])
def test_delivered_codes_and_scales_reproduce_the_forward_pass_bit_for_bit(name):
    net, x, _ = supernet(name)
    rng = np.random.default_rng(0)
    for kind in ("random", "max", "random"):
        configuration = net.space.draw(net.layout, rng, kind)
        given = given_of(freeze(net, configuration, [x]))
        net.constants.update({k: torch.from_numpy(np.array(v)) for k, v in given.constants.items()})
        graph = net.graph.copy()
        graph.constants = dict(given.constants)
        with torch.no_grad():
            delivered = run(graph, x, dequantised_parameters(graph, given.weights), simulated(given.scales))
            own = net(x, configuration, batch_norm)
        assert torch.equal(delivered, own)
        for p in net.layout.layers:
            w = given.weights[p.output]
            assert w.bits == configuration.weight[p.name].bits
            assert int(np.abs(w.codes.astype(int)).max()) <= min(127, 2**w.bits - 1)


def test_eight_bits_are_nearly_the_float_model():
    net, x, model = supernet("residual")
    graph = net.graph
    with torch.no_grad():
        truth = model(x)
        assert torch.allclose(run(graph, x, float_parameters(graph)), truth, atol=1e-4)
        for form in net.space.forms():
            frozen = freeze(net, net.space.uniform(net.layout, 8, 8, form), [x])
            graph8 = frozen.graph.copy()
            graph8.constants = dict(net.graph.constants)  # the float model's own statistics: only rounding is judged here
            got = run(graph8, x, dequantised_parameters(graph8, frozen.weights), simulated(frozen.scales))
            assert float((got - truth).square().mean().sqrt() / truth.std()) < 0.02, form


def test_the_real_engine_computes_what_was_trained(finished):
    """8-bit values, weights of every width, 7-bit codes where the kernels need them."""
    net = finished.supernet()
    images, _ = elastic_nets.digits()
    x = torch.from_numpy(elastic_nets.PREPROCESS.apply(images[:64]))
    for w, qmax, target in ((8, 64, "ort-x86-avx2"), (3, 64, "ort-x86-avx2"), (8, 127, "ort-x86-vnni")):
        frozen = freeze(net, net.space.uniform(net.layout, w, 8), [x], qmax)
        recipe = make_recipe(
            finished.program(), elastic_nets.PREPROCESS, Pictures(images[:8], None), Options((target,)), given=given_of(frozen)
        )
        written = write(recipe.targets[0], recipe.model)
        engine = session(written.model, recipe.model.table.tensors() | written.codes, exact=qmax > 64)
        got, own = infer(engine, x.numpy()), frozen.logits([x])
        assert float(np.sqrt(np.mean((got - own) ** 2)) / own.std()) < 0.02, w
        assert int((got.argmax(1) != own.argmax(1)).sum()) <= 1


def test_codes_too_wide_for_a_target_are_rounded_anew_to_seven_bits(finished):
    net = finished.supernet()
    images, _ = elastic_nets.digits()
    x = [torch.from_numpy(elastic_nets.PREPROCESS.apply(images[:32]))]
    for form in net.space.forms():
        for w in (8, 7, 5):
            frozen = freeze(net, net.space.uniform(net.layout, w, 8, form), x, 64)
            for p in net.layout.layers:
                codes = frozen.weights[p.output]
                assert int(np.abs(codes.codes.astype(int)).max()) <= 64 and codes.bits <= 7
                weight = net.weight_of(p.name).numpy()
                error = np.sqrt(np.mean((codes.dequantised() - weight) ** 2)) / weight.std()
                assert error < (0.05 if p.pinned or w > 5 else 0.25)


def test_statistics_are_those_torch_would_keep():
    net, x, _ = supernet("vgg")
    moments = Moments()
    with torch.no_grad():
        for part in (x[:8], x[8:]):
            run(net.graph, part, float_parameters(net.graph), None, moments)
    first = net.graph.nodes[0]
    values = torch.nn.functional.conv2d(x, net.constants[first.parameters["weight"]], padding=1)
    found = moments.constants()
    np.testing.assert_allclose(found[first.parameters["mean"]], values.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found[first.parameters["variance"]], values.var((0, 2, 3)), rtol=1e-4)


def test_training_mode_is_the_batchs_own_statistics_and_inference_is_untouched():
    net, x, model = supernet("residual")
    with torch.no_grad():
        plain = run(net.graph, x, float_parameters(net.graph))
        assert torch.equal(plain, run(net.graph, x, float_parameters(net.graph), norm=batch_norm))
        trained = run(net.graph, x, float_parameters(net.graph), norm=batch_statistics)
        assert torch.allclose(trained, model.train()(x), atol=1e-4) and not torch.allclose(plain, trained, atol=1e-3)


def test_a_supernet_comes_back_from_its_state(fresh):
    captured, parameters = fresh.captured, fresh.trainable
    again = Supernet.restore(captured, fresh.space, parameters, fresh.state())
    assert list(again.learned()) == list(fresh.learned())
    x = torch.zeros(2, 3, 16, 16)
    c = fresh.space.draw(fresh.layout, np.random.default_rng(1))
    with torch.no_grad():
        assert torch.equal(again(x, c), fresh(x, c))
    with pytest.raises(InputError, match="another network or space"):
        Supernet.restore(captured, Space((2, 3, 5), (2,)), parameters, {"constant/x": x})


def test_what_has_no_elastic_part_is_refused():
    with pytest.raises(ModelError, match="at least three"):
        supernet("unary")


def test_a_configuration_of_another_network_is_refused(fresh):
    other, x, _ = supernet("residual")
    with pytest.raises(UsageError, match="not one of this network"):
        freeze(fresh, other.space.uniform(other.layout, 4, 4), [x])


def test_values_no_layer_reads_stay_at_eight_bits(fresh):
    by_name = {v.name: v.pinned for v in fresh.layout.values}
    producers = fresh.graph.producers()
    pooled = next(n.output for n in fresh.graph.nodes if n.op in ("mean", "global_avg_pool"))
    branch = next(i for n in fresh.graph.nodes if n.op == "add" for i in n.inputs if fresh.graph.only_reader(i) is n)
    assert by_name["input"] and by_name[branch] and by_name.get(pooled, True)
    elastic = [n for n, pinned in by_name.items() if not pinned]
    assert all(any(p.source == n for p in fresh.layout.layers) for n in elastic) and len(elastic) == 4
    assert producers[elastic[0]].op == "conv"
