"""Names the model brings never meet names that are made here; what nobody expected ends as one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import export_nets
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from export.capture import capture
from export.engines import infer, session
from export.frontend.names import Names
from export.lower import HANDLERS
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.errors import InternalError

PICTURES = Pictures(export_nets.pictures(32), None)
SIZE = export_nets.SIZE


def test_a_name_is_given_once():
    names = Names(["a", "a_2"])
    assert [names.fresh("a"), names.fresh("b"), names.fresh("b"), names.fresh("a")] == ["a_3", "b", "b_2", "a_4"]


class Gain(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), value))

    def forward(self, x):
        return x * self.scale


class Named(nn.Module):
    """Rolls and stacks that made the same names twice, and parameters called as the writers call their own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), export_nets.Head(8)
        self.mul, self.root2 = Gain(0.5), nn.Parameter(torch.full((8, 1, 1), 3.0))
        self.input = nn.Parameter(torch.ones(8, 1, 1))
        self.a = nn.ModuleDict({"b": nn.BatchNorm2d(8)})
        self.a__b, self.one, self.two = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.mul(F.relu(self.norm(self.conv(x))))
        x = x.roll((1, 2), (2, 3)).roll((-1, 3), (2, 3)) * self.root2
        x = torch.stack([x, x * 2], 1).sum(1) + torch.stack([x, x], 1).mean(1) + self.input
        x = F.gelu(self.a["b"](self.one(x)))
        return self.head(F.gelu(self.a__b(self.two(x))))


def test_names_that_are_taken_are_not_given_again(tmp_path, x):
    torch.manual_seed(0)
    net = export_nets.settled(Named())
    options = Options(("ort-x86-avx2", "litert", "tensorrt"))
    done = export_model(net, tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, options)
    graph = done.recipe.graph
    assert len({n.output for n in graph.nodes}) == len(graph.nodes) and len({n.name for n in graph.nodes}) == len(graph.nodes)
    assert len(done.bundle.norms.norms) == 3
    with torch.no_grad():
        truth = net(torch.from_numpy(x)).numpy()
    bundle = done.bundle
    logits = infer(session(bundle.read(bundle.target().model), bundle.norms.tensors()), x)
    assert np.sqrt(np.mean((logits - truth) ** 2)) < 0.15 * truth.std()


class Like(nn.Module):
    """A layer called as a functional call of the same program would be, or as the writers call what they make."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), export_nets.Head(8)
        self.add_module(name, nn.Conv2d(8, 8, 1))
        self.after = nn.BatchNorm2d(8)
        self.layer = name

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.after(getattr(self, self.layer)(x))) * 1.5
        return self.head(torch.cat([y[:, :4], (y + x)[:, 4:]], 1) + x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("name", ["mul", "add", "add_1", "relu", "cat", "mean", "logits", "moments", "input", "output"])
def test_a_layer_may_be_called_as_what_is_made_here(name, tmp_path, x):
    torch.manual_seed(0)
    net = export_nets.settled(Like(name))
    options = Options(("ort-x86-avx2", "litert", "tensorrt"))
    done = export_model(net, tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, options)
    bundle = done.bundle
    with torch.no_grad():
        truth = net(torch.from_numpy(x)).numpy()
    logits = infer(session(bundle.read(bundle.target().model), bundle.norms.tensors()), x)
    assert np.sqrt(np.mean((logits - truth) ** 2)) < 0.15 * truth.std()


def broken(low, node, out):
    raise KeyError("roll_1")


def test_a_fault_inside_names_the_layer_and_the_operator(monkeypatch):
    monkeypatch.setitem(HANDLERS, torch.ops.aten.relu.default, broken)
    with pytest.raises(InternalError, match=r"Layer relu \(torch.ops.aten.relu.default\).*KeyError.*report it") as e:
        capture(export_nets.make("optiona"), SIZE, SIZE)
    assert isinstance(e.value.__cause__, KeyError) and e.value.exit_code == 70


def test_a_fault_in_a_writer_names_the_layer(monkeypatch, tmp_path):
    from export.targets import ort

    def fails(b, node, target):
        raise IndexError("list index out of range")

    monkeypatch.setattr(ort, "emit_integer_layer", fails)
    with pytest.raises(InternalError, match=r"Writing layer c1 \(conv\).*IndexError"):
        export_model(export_nets.make("grouped"), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES,
                     Options(observer="minmax"))  # fmt: skip
    assert not list(tmp_path.iterdir())


FAULTY = """
import sys
from refold import cli
def fails(*args):
    raise KeyError("roll_1")
import export.cli
export.cli.parse_preprocess = fails
given = ["export", "m.py:f", "--calibration", "c", "--preprocess", "p", "-o", "m.refold"]
cli.main((["--debug"] if sys.argv[1] == "debug" else []) + given)
"""


def test_the_command_ends_in_a_sentence_and_70():
    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FAULTY, how]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    done = run("plainly")
    assert done.returncode == 70 and "Traceback" not in done.stderr
    assert "`refold export` failed inside Refold (KeyError: 'roll_1')" in done.stderr and "--debug" in done.stderr
    done = run("debug")
    assert done.returncode == 1 and "Traceback" in done.stderr
