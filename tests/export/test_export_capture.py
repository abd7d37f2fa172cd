"""MODEL as a person names it, and the clear refusals: what is wrong, in which layer."""

from __future__ import annotations

from pathlib import Path

import export_nets
import pytest
import torch
from torch import nn

from export.capture import capture, load_model
from export.pictures import Pictures
from export.pipeline import Options, export_model, make_recipe
from refold.errors import InputError, ModelError, RefoldError, UsageError

HERE = Path(__file__).parent
SIZE = export_nets.SIZE
PICTURES = Pictures(export_nets.pictures(16), None)


def recipe(net: nn.Module, **options):
    return make_recipe(net.eval(), export_nets.PREPROCESS, PICTURES, Options(**options))


def test_three_ways_to_name_a_model(tmp_path, monkeypatch):
    assert isinstance(load_model(f"{HERE / 'export_nets.py'}:residual"), nn.Module)
    monkeypatch.syspath_prepend(str(HERE))
    assert isinstance(load_model("export_nets:Vgg"), nn.Module)
    program = torch.export.export(
        export_nets.make("vgg"), (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = load_model(str(tmp_path / "m.pt2"))
    assert [n.op for n in capture(loaded, SIZE, SIZE).nodes][:2] == ["conv", "batch_norm"]
    with pytest.raises(ModelError, match="takes"):
        capture(loaded, SIZE * 2, SIZE)
    with pytest.raises(UsageError, match="carries its own weights"):
        load_model(str(tmp_path / "m.pt2"), tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nothing", "neither"),
        ("nowhere.py:f", "no file"),
        ("no.such.module:f", "cannot be imported"),
        (f"{HERE / 'export_nets.py'}:absent", "no callable"),
        (f"{HERE / 'export_nets.py'}:Head", "failed when it was called without arguments"),
        (f"{HERE / 'export_nets.py'}:pictures", "must return a torch"),
        ("absent.pt2", "no file"),
        (f"{HERE / 'broken_model.py'}:f", "cannot be run"),
    ],
)
def test_models_that_are_not_there(spec, says, tmp_path):
    if "broken_model" in spec:
        (tmp_path / "broken_model.py").write_text("import nothing_of_that_name\n")
        spec = f"{tmp_path / 'broken_model.py'}:f"
    with pytest.raises(RefoldError, match=says):
        load_model(spec)


def test_a_damaged_program(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not an exported program"):
        load_model(str(tmp_path / "m.pt2"))


class Odd(nn.Module):
    """A small net with one thing in its middle."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.conv, self.norm, self.middle, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), middle, export_nets.Head(8)

    def forward(self, x):
        return self.head(self.middle(self.norm(self.conv(x))))


class Call(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (Call(lambda x: torch.cumsum(x, 2)), "Layer middle uses torch.ops.aten.cumsum.default"),
        (Call(lambda x: x.roll(1, 0)), "rolls the batch"),
        (Call(lambda x: x.mean(0, keepdim=True) + x), "averages over the batch"),
        (Call(lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")), "pads with something other"),
        (Call(lambda x: torch.nn.functional.pad(x, (-1, 0, 0, 0))), "negative width"),
        (Call(lambda x: x.double().float()), "export the float32 model"),
        (Call(lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 5)), "does not divide"),
        (Call(lambda x: x / x.shape[0]), "batch size"),
        (nn.BatchNorm2d(8, track_running_stats=False), "statistics of each batch"),
        (nn.LayerNorm((8, 14, 14)), "over several axes"),
        (Call(lambda x: torch.nn.functional.dropout(x, 0.5, True)), "at random"),
        (Call(lambda x: x if x.sum() > 0 else -x), "cannot capture"),
        (nn.Hardshrink(), "hardshrink"),
        (nn.Upsample(scale_factor=1.5), "not whole"),
    ],
)
def test_layers_that_cannot_be_exported_are_named(middle, says, capfd):
    with pytest.raises(ModelError, match=says):
        recipe(Odd(middle))
    assert capfd.readouterr() == ("", "")  # torch prints the whole graph of what it cannot capture


def test_models_that_do_not_classify_pictures():
    with pytest.raises(ModelError, match="does not take an input"):
        recipe(nn.Sequential(nn.Conv2d(1, 4, 3)))
    with pytest.raises(ModelError, match=r"output has shape \(batch, 4, 14, 14\)"):
        recipe(nn.Sequential(nn.Conv2d(3, 4, 3)))
    both = Call(lambda x: (x.mean((2, 3)), x))
    with pytest.raises(ModelError, match="returns 2 tensors"):
        recipe(both)


def test_no_norm_no_layers_shared_norm_training_mode():
    with pytest.raises(ModelError, match="no norm layer"):
        recipe(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), export_nets.Head(8)))
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        recipe(nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    norm = nn.BatchNorm2d(8)
    twice = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 1), norm, export_nets.Head(8))
    with pytest.raises(ModelError, match="is used twice") as e:
        recipe(twice)
    assert e.value.code == "shared-norm"
    net = export_nets.make("vgg")
    net[1].train()
    with pytest.raises(ModelError, match="1 is in training mode"):
        make_recipe(net, export_nets.PREPROCESS, PICTURES)


def test_a_layer_used_twice_without_a_norm_is_fine(tmp_path):
    shared = nn.Conv2d(8, 8, 1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), shared, nn.ReLU(), shared, export_nets.Head(8))
    done = export_model(export_nets.settled(net), tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES)
    assert len({s.name for s in done.bundle.norms.sites}) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    net = export_nets.make("residual")
    with torch.no_grad():
        net.head.fc.weight[0, 0] = value
    with pytest.raises(InputError, match=r"head\.fc\.weight contains NaN or infinity"):
        recipe(net)


def test_a_model_that_answers_every_picture_alike():
    net = export_nets.make("residual")
    with torch.no_grad():
        net.head.fc.weight.zero_()
    with pytest.raises(InputError, match="answers every calibration picture alike"):
        recipe(net)


def test_options_that_make_no_sense(tmp_path):
    net = export_nets.make("vgg")
    with pytest.raises(UsageError, match="at least one"):
        recipe(net, targets=())
    with pytest.raises(UsageError, match="no target 'tpu'"):
        recipe(net, targets=("tpu",))
    with pytest.raises(UsageError, match="fits no layer"):
        recipe(net, keep_float=("zzz*",))
    with pytest.raises(UsageError, match="no directory"):
        export_model(net, tmp_path / "no" / "m.refold", export_nets.PREPROCESS, PICTURES)
    with pytest.raises(UsageError, match="names 2 classes; the model has 5"):
        export_model(net, tmp_path / "m.refold", export_nets.PREPROCESS, PICTURES, Options(classes=("a", "b")))
    assert not list(tmp_path.iterdir())
