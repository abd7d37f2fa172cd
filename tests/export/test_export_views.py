"""In-place operators and views: what is exported computes what the module computes, or nothing is exported."""

from __future__ import annotations

import os

import export_nets
import numpy as np
import pytest
import random_modules
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import export.capture
from export.capture import capture, program_of
from export.engines import infer, session
from export.frontend.functional import functionalise
from export.frontend.reference import probe
from export.frontend.run import run_program
from export.interpret import float_parameters, run
from export.lower import HANDLERS
from export.pictures import Pictures
from export.pipeline import Options, export_model, make_recipe
from refold.errors import GateError, ModelError

SIZE = export_nets.SIZE
PICTURES = Pictures(export_nets.pictures(32), None)


class Wrapped(nn.Module):
    """A function between two blocks; it may use the module it stands in."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.middle, self.calls = middle, 0
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2, self.head = nn.Conv2d(16, 8, 3, 2), nn.BatchNorm2d(8), export_nets.Head(8)
        self.drop, self.relu, self.gain = nn.Dropout(), nn.ReLU(inplace=True), nn.Parameter(torch.full((16, 1, 1), 0.5))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(16, 1, 1))

    def forward(self, x):
        return self.head(F.relu(self.bn2(self.conv2(self.middle(self, self.bn1(self.conv1(x)))))))


def wrapped(middle) -> Wrapped:
    torch.manual_seed(0)
    return export_nets.settled(Wrapped(middle))


def eager(net: nn.Module, x: np.ndarray) -> np.ndarray:
    """One image at a time, as a device asks."""
    with torch.no_grad():
        return torch.cat([net(torch.from_numpy(image[None].copy())) for image in x]).numpy()


def lowered(net: nn.Module, x: np.ndarray) -> np.ndarray:
    graph = capture(net, SIZE, SIZE)
    with torch.no_grad():
        return run(graph, torch.from_numpy(x), float_parameters(graph)).numpy()


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1e-4 * b.std())


def five(m, y):
    y = F.relu(y)
    y[:, :8].mul_(5.0)
    return y


def assigned(m, y):
    y[:, :8] = y[:, 8:] * 2
    y[:, :, ::2, ::2].add_(1.0)
    y[:, 3].relu_()
    y[..., 5:7] = 0.25
    return y


def filled(m, y):
    z, w = torch.empty(y.shape[0], 32, SIZE, SIZE), torch.zeros_like(y)
    z[:, ::2], z[:, 1::2] = y, y * 2
    w[:, :8], w[:, 8:] = F.relu(y[:, 8:]), y[:, :8]
    return z[:, 8:24] + w


def in_parts(m, y):
    a, b = y.chunk(2, 1)
    a.relu_()
    b.add_(a, alpha=3.0)
    for row in y.unbind(1)[:3]:
        row.mul_(2)
    y.split((4, 12), 1)[1].clamp_(-1, 2)
    y.narrow(1, 2, 3).neg_()
    return y


def turned(m, y):
    early = y[:, :2]
    y.view(y.shape[0], -1).clamp_(-2, 1)
    y.transpose(2, 3)[:, :, :4].mul_(0.5)
    y.permute(0, 2, 3, 1)[..., 4:].add_(1)
    y.movedim(1, -1)[..., 0].zero_()
    z = y.unsqueeze(1)
    z.squeeze_(1)
    z.reshape(y.shape[0], 2, 8, SIZE, SIZE)[:, 1].tanh_()
    return y + early.sum(1, keepdim=True)


def aliased(m, y):
    """Dropout in evaluation, contiguous and detach return their own input."""
    kept = y
    m.drop(y).add_(1.0)
    y.contiguous()[:, :4].mul_(2.0)
    y.detach()[:, 4:6].sub_(0.5)
    y.permute(0, 2, 3, 1).contiguous().mul_(100.0)  # and this is a copy
    return m.relu(y) + kept


def noted(m, y):
    m.count.add_(1)
    m.average.copy_(y.mean((0, 2, 3)).view(16, 1, 1))
    m.calls += 1
    m.last = y
    return y.mul_(m.gain).sub_(m.gain)


def powers(m, y):
    """In-place forms whose overloads are called otherwise than those of the pure operator."""
    y = F.relu(y)
    y.pow_(2)
    y **= 2
    y[:, :4].pow_(0.5).div_(2.0)
    return y.sqrt_().clamp_(max=3.0)


@pytest.mark.parametrize("middle", [five, assigned, filled, in_parts, turned, aliased, noted, powers], ids=lambda f: f.__name__)
def test_the_graph_computes_what_the_module_computes(middle, x):
    net = wrapped(middle)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ours = lowered(net, x)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items()), "the module was changed"
    assert alike(ours, eager(net, x))


def test_a_write_through_a_view_reaches_the_engine(tmp_path, x):
    net = wrapped(five)
    done = export_model(net, tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES)
    target = done.bundle.target()
    logits = infer(session(done.bundle.read(target.model), done.bundle.norms.tensors()), x)
    truth = eager(net, x)
    assert np.sqrt(np.mean((logits - truth) ** 2)) < 0.1 * truth.std()


def test_functional_programs_keep_their_names_and_answers():
    program = program_of(wrapped(in_parts), SIZE, SIZE)
    pure = functionalise(program, probe(SIZE, SIZE))
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in pure.graph.nodes)
    assert {"conv2d", "relu_", "mul_", "mul__1", "clamp_"} <= {n.name for n in pure.graph.nodes}
    torch.testing.assert_close(run_program(pure, probe(SIZE, SIZE, 5)), run_program(program, probe(SIZE, SIZE, 5)))
    assert functionalise(pure, probe(SIZE, SIZE)) is pure


def rand(m, y):
    return y * torch.rand(1, 16, 1, 1)


def counting(m, y):
    m.count.add_(1)
    return y * m.count


def remembering(m, y):
    z = y - m.average
    m.average.mul_(0.9).add_(0.1 * y[:1].mean((0, 2, 3)).view(16, 1, 1))
    return z


def python_counter(m, y):
    m.calls += 1
    return y * m.calls


def alone(m, y):
    return y * 2 if y.shape[0] == 1 else y


def when_exported(m, y):
    return y * 2 if torch.compiler.is_exporting() else y


def overlapping(m, y):
    y.transpose(2, 3)[:, :, :4].add_(y[:, :, :4])
    return y


def odd_view(m, y):
    y.diagonal(0, 2, 3).mul_(2)
    return y


@pytest.mark.parametrize(
    ("middle", "error", "code", "says"),
    [
        (rand, ModelError, "not-a-function", "differently from one call to the next"),
        (counting, ModelError, "not-a-function", "differently from one call to the next"),
        (python_counter, ModelError, "not-a-function", "differently from one call to the next"),
        (alone, ModelError, "batch", "differently alone than among others"),
        (when_exported, GateError, "differs", "from conv2 on"),
        (overlapping, GateError, "differs", "from add_ on"),
        (odd_view, ModelError, "operator", "changes in place what aten.diagonal.default made"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_has_no_one_answer_is_refused(middle, error, code, says):
    with pytest.raises(error, match=says) as e:
        make_recipe(wrapped(middle), export_nets.PREPROCESS, PICTURES, Options(observer="minmax"))
    assert e.value.code == code


def test_memory_of_earlier_images_is_refused_by_name():
    with pytest.raises(ModelError, match="average is changed by every image") as e:
        capture(wrapped(remembering), SIZE, SIZE)
    assert e.value.code == "state"


def test_an_operator_that_is_lowered_wrongly_is_named(monkeypatch):
    relu = torch.ops.aten.relu.default
    monkeypatch.setitem(HANDLERS, relu, lambda low, node, out: low.add("clamp", [low.arg(node, 0)], out, low=0.0, high=0.1))
    with pytest.raises(GateError, match="from relu on") as e:
        capture(wrapped(lambda m, y: torch.tanh(y)), SIZE, SIZE)
    assert e.value.detail == "relu"


def test_a_rule_that_changes_the_answer_is_found_on_the_images(monkeypatch):
    from export import rounding

    def wrong(graph):
        found = export_rules(graph)
        last = next(n for n in found.nodes if n.name == "conv2")
        found.constants[last.parameters["weight"]] = found.constants[last.parameters["weight"]] * np.float32(1.5)
        return found

    export_rules = rounding.apply_rules
    monkeypatch.setattr(rounding, "apply_rules", wrong)
    with pytest.raises(GateError, match="does not compute what the model computes"):
        make_recipe(wrapped(lambda m, y: F.relu(y)), export_nets.PREPROCESS, PICTURES, Options(observer="minmax"))


def test_a_module_of_another_dtype_stays_as_it_is(x):
    net = wrapped(lambda m, y: F.relu(y)).double()
    capture(net, SIZE, SIZE)
    assert net.conv1.weight.dtype == torch.float64


def test_an_unfollowed_module_is_refused_in_a_sentence():
    net = wrapped(lambda m, y: y)
    net.lock = __import__("threading").Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        export.capture.program_of(net, SIZE, SIZE)


@pytest.mark.parametrize("seed", [2, 4])
def test_random_modules_are_exported_or_refused(seed, tmp_path):
    kind, why = random_modules.outcome(random_modules.random_module(seed), tmp_path)
    assert kind in ("exported", "refused"), why


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_random_modules(capsys):
    """REFOLD_RANDOM_MODULES of them (default 300); the counts are printed."""
    with capsys.disabled():
        assert random_modules.main(int(os.environ.get("REFOLD_RANDOM_MODULES", "300"))) == 0
