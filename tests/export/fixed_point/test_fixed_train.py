"""Training on the captured graph: it learns, stays on its grids, follows its seed, and survives a kill."""

from __future__ import annotations

import dataclasses
import math

import export_nets
import numpy as np
import pytest
import torch
from fixed_point_nets import QUICK, labelled, trainer_of

from export.capture import capture
from export.fixed_point.checkpoint import resume, save
from export.fixed_point.network import Network, fitted, generator_of, macs
from export.fixed_point.precision import Strategy
from export.fixed_point.report import report
from export.fixed_point.settings import Settings, as_published, for_integers, in_float32
from export.fixed_point.train import Plateau, Trainer, augmented, unit
from export.interpret import float_parameters, run
from refold.errors import InputError, ModelError, UsageError


def leaves(trainer: Trainer) -> dict[str, bytes]:
    net = trainer.network
    kept = {**net.quantised, **net.statistics, **{f"{n} master": t for n, t in net.master.items()}}
    return {n: t.detach().numpy().tobytes() for n, t in kept.items()}


@pytest.mark.parametrize("settings", [
    for_integers(**{**QUICK, "epochs": 8}, from_scratch=True), Settings(**{**QUICK, "epochs": 8}, from_scratch=True),
], ids=["integers", "published"])  # fmt: skip
def test_it_learns_from_scratch(settings):
    trainer = trainer_of(settings, count=160)
    trainer.run()
    epochs = trainer.state.epochs
    assert len(epochs) == 8
    assert np.mean([e.accuracy for e in epochs[-5:]]) > max(0.65, epochs[0].accuracy)  # four classes


@pytest.mark.parametrize("published", [False, True])
def test_every_leaf_is_on_its_grid(published, trained, trained_as_published):
    net = (trained_as_published if published else trained).network
    for name, leaf in net.quantised.items():
        assert net.form_of(name).holds(leaf.detach()), name
    assert all(f.narrow and f.word <= (32 if published else 8) for f in net.forms.values())


def test_words_follow_the_paper_where_asked(trained_as_published):
    trainer = trained_as_published
    assert trainer.state.switches >= 7 and all(f.word >= f.fraction + 8 for f in trainer.network.forms.values())
    assert isinstance(trainer.state.strategy, Strategy)
    followers = {n: trainer.network.form_of(n) for n in trainer.network.leader}
    assert all(f.word == trainer.network.forms[trainer.network.leader[n]].word for n, f in followers.items())


def test_switching_ends_in_fewer_bits_than_it_began_with():
    """While the loss falls, what a push-down saves is kept."""
    settings = for_integers(epochs=2, batch=8, accumulation=1, lookback=(25, 25), refresh=25, learning_rate=0.01)
    trainer = trainer_of(settings, count=216)
    trainer.run()
    assert trainer.state.switches >= 2 * len(trainer.network.forms)
    assert trainer.state.epochs[-1].average_word < 7.5


def test_vectors_follow_the_weights_before_them():
    net = trainer_of(Settings(**QUICK)).network
    assert net.leader["stem.1.weight"] == "stem.0.weight" and net.leader["head.fc.bias"] == "head.fc.weight"
    net = trainer_of(Settings(**QUICK), "dense").network
    assert net.leader["n1.weight"] == "stem.weight"


def test_activations_are_an_engines_codes(trained):
    net = trained.network
    x = torch.from_numpy(export_nets.PREPROCESS.apply(export_nets.pictures(8)))
    seen = {}
    constants = {n: torch.from_numpy(v) for n, v in net.constants().items()}

    def at(value, y):
        form = net.form_of_value(value)
        y = y if form is None else form.nearest(y)
        seen[value] = y
        return y

    logits = run(net.graph, x, lambda n: {r: constants[c] for r, c in n.parameters.items()}, at)
    assert torch.equal(logits, net.evaluate(x))
    assert set(net.values) == set(net.placement.scaled)
    for value, form in net.values.items():
        codes = seen[value] / form.step + form.zero_point
        assert torch.equal(codes, codes.round()) and float(codes.min()) >= 0 and float(codes.max()) <= 255
    signed = {v: f.signed for v, f in net.values.items()}
    assert signed["input"] and not signed[net.graph.nodes[0].output]


@pytest.mark.parametrize(("clamp", "low", "high"), [(None, -1.0, 5.0), ((0.0, math.inf), 0.0, 9.0), ((0.0, 6.0), 0.0, 6.0),
                                                   ((-2.0, 2.0), -2.0, 2.0)])  # fmt: skip
def test_the_codes_of_an_activation_never_leave_its_function(clamp, low, high):
    x = torch.linspace(low, high, 1001)
    form = fitted(x, 8, clamp)
    assert form.signed is (low < 0)
    if clamp is not None:
        assert form.highest <= clamp[1] and form.lowest >= clamp[0]
    if clamp is None or math.isinf(clamp[1]):
        assert form.highest + form.step >= high / 4 and float((form.nearest(x) - x).square().mean()) < 1e-2


def test_float32_is_the_same_training_without_quantisers():
    trainer = trainer_of(in_float32(for_integers(**QUICK)))
    x = torch.from_numpy(export_nets.PREPROCESS.apply(export_nets.pictures(8)))
    graph = trainer.network.graph
    assert torch.equal(trainer.network.evaluate(x), run(graph, x, float_parameters(graph)))
    trainer.run()
    told = report(trainer)
    assert (told.average_word, told.size_ratio_with_zeros, told.modelled_training_speed_up, told.switches) == (32, 1, 1, 0)
    assert all(torch.equal(q.detach(), trainer.network.master[n]) for n, q in trainer.network.quantised.items())


def test_training_norms_are_torchs():
    """The hook of the interpreter against a torch module in training mode: same logits, same running statistics."""
    module = export_nets.make("vgg")
    net = Network(capture(module, 16, 16), in_float32(for_integers(**QUICK)))
    x = torch.from_numpy(export_nets.PREPROCESS.apply(export_nets.pictures(16, seed=3)))
    for m in module.modules():
        if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            m.momentum = 0.1
    ours, theirs = net.train(x, generator_of(0, "test")), module.train()(x)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for name, buffer in module.named_buffers():
        if name in net.statistics:
            assert torch.allclose(net.statistics[name], buffer, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("name", sorted(set(export_nets.NETS) - {"decomposed"}))
def test_every_family_trains(name):
    trainer = trainer_of(for_integers(**{**QUICK, "epochs": 1}, learning_rate=0.01), name, count=64)
    before = leaves(trainer)
    trainer.run()
    after = leaves(trainer)
    moved = [n for n in trainer.network.master if before[f"{n} master"] != after[f"{n} master"]]
    assert moved == list(trainer.network.master)
    assert math.isfinite(trainer.state.epochs[-1].loss)


def test_the_seed_decides_everything():
    first, same, other = (trainer_of(for_integers(**QUICK, augment=True, seed=s), count=64) for s in (1, 1, 2))
    for trainer in (first, same, other):
        trainer.run()
    assert leaves(first) == leaves(same) and leaves(first) != leaves(other)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_going_on_is_never_having_stopped(published, stop, tmp_path, trained, trained_as_published):
    settings = Settings(**QUICK) if published else for_integers(**QUICK)
    trainer = trainer_of(settings)
    while trainer.state.step < stop:
        trainer.step()
        if trainer.state.step % trainer.steps_in_epoch == 0:
            trainer._end_epoch()
    save(trainer, tmp_path / "c.pt")
    again = trainer_of(settings)
    resume(again, tmp_path / "c.pt")
    again.run()
    whole = trained_as_published if published else trained
    assert leaves(again) == leaves(whole)
    assert again.state == whole.state and report(again) == report(whole)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    trainer = trainer_of(for_integers(**QUICK), count=32)
    save(trainer, tmp_path / "c.pt")
    with pytest.raises(UsageError, match="another training"):
        resume(trainer_of(for_integers(**QUICK, seed=1), count=32), tmp_path / "c.pt")
    with pytest.raises(UsageError, match="another training"):
        resume(trainer_of(for_integers(**QUICK), count=34), tmp_path / "c.pt")
    whole = (tmp_path / "c.pt").read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "d.pt").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            resume(trainer, tmp_path / "d.pt")


def test_the_rate_falls_on_a_plateau():
    p = Plateau(0.1)
    for loss in (1.0, 0.9, 0.9, 0.9):
        p = p.after(loss, 2, 1e-6, 0.1)
    assert p.rate == 0.1 and p.bad == 2
    p = p.after(0.9, 2, 1e-6, 0.1)
    assert p.rate == pytest.approx(0.01) and p.bad == 0
    assert p.after(0.5, 2, 1e-6, 0.1).best == 0.5


def test_augmentation_moves_pictures_and_nothing_else():
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = augmented(x, generator_of(0, "test"))
    assert y.shape == x.shape and not torch.equal(x, y)
    one = augmented(torch.ones(64, 1, 16, 16), generator_of(0, "test", 2))
    kept = one.sum((1, 2, 3)) / 256
    assert set(one.unique().tolist()) == {0.0, 1.0} and float(kept.min()) >= (14 / 16) ** 2
    assert len(kept.unique()) > 3


def test_a_unit_gradient_of_zeros_is_zero():
    assert torch.equal(unit(torch.zeros(3)), torch.zeros(3)) and float(unit(torch.ones(4)).norm()) == 1.0


def test_macs_of_known_layers():
    found = macs(trainer_of(Settings(**QUICK)).network.graph)
    assert found["stem.0.weight"] == 8 * 3 * 9 * 256 and found["b.0.weight"] == 16 * 8 * 9 * 64
    assert found["head.fc.weight"] == 16 * 5


def test_diverging_is_said():
    trainer = trainer_of(in_float32(for_integers(**QUICK)), count=32)
    trainer.network.master["head.fc.weight"].fill_(math.inf)
    trainer.network.requantise(generator_of(0, "test"))
    with pytest.raises(ModelError, match="diverged"):
        trainer.step()


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", 0), ("learning_rate", 0.0), ("momentum", 1.0), ("lookback", (9, 3)), ("resolution", (1, 5)), ("longest", 33),
    ("word", 9), ("buffer", 8), ("seed", -1), ("tolerance", math.nan), ("activation_word", 1), ("vector_word", 33),
    ("epochs", True), ("lookback", 5), ("lookback", (1.5, 2)), ("l1", "much"), ("augment", 1),
])  # fmt: skip
def test_settings_are_checked(name, value):
    with pytest.raises(UsageError, match=name):
        for_integers(**{name: value})


def test_settings_survive_json():
    import json

    settings = for_integers(7, lookback=(3, 4))
    assert Settings.decode(json.loads(json.dumps(settings.encode()))) == settings
    with pytest.raises(UsageError, match="colour"):
        Settings.decode({"colour": 1})
    assert dataclasses.replace(settings, float32=True) == in_float32(settings)
    assert as_published().word == 16 and as_published(from_scratch=True).fraction == 4


def test_labels_must_fit():
    images, labels = labelled(8, 0)
    network = trainer_of(Settings(**QUICK), count=8).network
    for wrong in (labels[:4], labels + export_nets.CLASSES, labels - export_nets.CLASSES):
        with pytest.raises(InputError, match="label"):
            Trainer(network, export_nets.PREPROCESS, images, wrong)
