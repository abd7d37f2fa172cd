"""Regularisation, guidance, data order, and a training that a SIGKILL does not change."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import elastic_nets
import numpy as np
import pytest
import torch
from elastic_nets import MODEL
from torch.nn import functional as F  # noqa: N812

from export.capture import capture, program_of
from export.elastic.data import Labelled, Split, augmented, load_labelled, order_of
from export.elastic.folder import Checkpoint, RunFolder, Settings, Training
from export.elastic.frozen import freeze
from export.elastic.guidance import guide, sandwich
from export.elastic.regular import kurtosis_term, skewness_term, weight_distribution_loss
from export.elastic.space import Space
from export.elastic.supernet import Supernet
from export.elastic.train import Trainer, train
from export.interpret import batches, float_parameters, run, simulated
from export.quantise import dequantised_parameters, quantise_weights
from export.scales import Scale
from refold.errors import InputError, ModelError, UsageError


def test_a_uniform_distribution_costs_nothing_and_a_bell_does():
    n = torch.arange(100_000)
    uniform = (n / 99_999 - 0.5).reshape(100, 1000)
    assert float(weight_distribution_loss([uniform, 3 * uniform + 1])) < 1e-6
    torch.manual_seed(0)
    bell = torch.randn(200_000)
    assert float(kurtosis_term([bell])) == pytest.approx((3 - 1.8) ** 2, rel=0.05) and float(skewness_term([bell])) < 1e-3
    skewed = torch.distributions.Exponential(1.0).sample((200_000,))  # skewness 2, kurtosis 9
    assert float(skewness_term([skewed])) == pytest.approx(4, rel=0.1)
    assert float(weight_distribution_loss([skewed])) == pytest.approx(0.015 * (9 - 1.8) ** 2 + 4, rel=0.25)


def test_the_first_layer_is_not_regularised(fresh):
    names = [p.name for p in fresh.layout.layers]
    assert [id(w) for w in fresh.regular_weights()] == [id(fresh.weight_of(n)) for n in names[1:]]


class Recorder:
    """Stands for a supernet: remembers who was run, and answers with what it was given."""

    def __init__(self, answers: list[torch.Tensor]) -> None:
        self.answers, self.seen = answers, []

    def __call__(self, x, configuration):
        self.seen.append(configuration)
        return self.answers[len(self.seen) - 1] * 1


def test_high_teaches_random_and_random_teaches_low(fresh):
    order = sandwich(fresh.space, fresh.layout, np.random.default_rng(0), 4)
    middle = [p.name for p in fresh.layout.elastic_layers]
    widths = [[c.weight[n].bits for n in middle] for c in order]
    assert set(widths[0]) == {8} and set(widths[-1]) == {2} and len({*widths[1], *widths[2]}) > 2
    torch.manual_seed(0)
    answers = [torch.randn(5, 3, requires_grad=True) for _ in range(3)]
    y, recorder = torch.tensor([0, 1, 2, 0, 1]), Recorder(answers)
    losses = guide(recorder, torch.zeros(5, 1), y, order[:3], 0.3)
    assert recorder.seen == order[:3]

    def kl(teacher, student):
        p = teacher.softmax(1)
        return float((p * (p.log() - student.log_softmax(1))).sum(1).mean().detach())

    ce = [float(F.cross_entropy(a.detach(), y)) for a in answers]
    wanted = [ce[0], 0.3 * kl(answers[0], answers[1]) + 0.7 * ce[1], 0.3 * kl(answers[1], answers[2]) + 0.7 * ce[2]]
    assert losses == pytest.approx(wanted, rel=1e-5)
    # The teacher learns nothing from its student: the first answer's gradient is that of its own cross-entropy.
    alone = answers[0].detach().clone().requires_grad_(True)
    F.cross_entropy(alone, y).backward()
    torch.testing.assert_close(answers[0].grad, alone.grad)


def test_gradients_of_all_subnets_add_up(fresh):
    net = Supernet.restore(fresh.captured, fresh.space, fresh.trainable, fresh.state())
    x, y = torch.randn(6, 3, 16, 16), torch.arange(6)
    order = sandwich(net.space, net.layout, np.random.default_rng(0))
    learned = net.learned()
    for tensor in learned.values():
        tensor.requires_grad_(True)
    sums: dict[str, torch.Tensor] = {}
    for configuration in order:
        guide(net, x, y, [configuration])
        for name, tensor in learned.items():
            if tensor.grad is not None:
                sums[name] = sums.get(name, torch.zeros_like(tensor)) + tensor.grad
                tensor.grad = None
    guide(net, x, y, order, lam=0.0)  # without teachers the three are independent
    for name, total in sums.items():
        torch.testing.assert_close(learned[name].grad, total, rtol=1e-3, atol=1e-5)
    assert "constant/head.weight" in sums and "constant/stem.1.weight" in sums and any("ratio" in n for n in sums)
    assert not any("running" in n for n in learned)


def test_order_and_augmentation_follow_from_seed_and_step():
    train_part = np.arange(100, 200)
    epoch = np.concatenate([order_of(train_part, 25, 3, step) for step in range(4)])
    assert sorted(epoch) == list(train_part) and not np.array_equal(epoch[:25], order_of(train_part, 25, 3, 4))
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    a, b = (augmented(images, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(a, b) and not np.array_equal(a, images) and a.dtype == np.uint8
    same = sum(np.array_equal(p, i) or np.array_equal(p, i[:, ::-1]) for p, i in zip(a, images, strict=True))
    assert same < 8


def test_a_split_holds_out_some_of_every_class():
    labels = np.repeat(np.arange(4), [50, 20, 10, 1])
    split = Split.of(labels, 0)
    assert not set(split.train) & set(split.held) and len(split.train) + len(split.held) == 81
    assert set(labels[split.held]) == {0, 1, 2} and len(split.held) == 8


def test_pictures_in_folders_are_read_when_they_are_needed(tmp_path):
    from PIL import Image

    images, labels = elastic_nets.digits()
    for i in range(12):
        (tmp_path / str(labels[i])).mkdir(exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / str(labels[i]) / f"{i}.png")
    data = load_labelled(tmp_path, elastic_nets.PREPROCESS)
    assert len(data) == 12 and set(data.labels) == set(range(10))
    shown = data.read(np.array([3, 0]))
    assert shown.shape == (2, 16, 16, 3)
    with pytest.raises(InputError, match="not the name of a class"):
        load_labelled(tmp_path, elastic_nets.PREPROCESS, ["0", "1"])
    (tmp_path / "1" / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        load_labelled(tmp_path, elastic_nets.PREPROCESS)
    np.savez(tmp_path / "bare.npz", images=images[:20])
    with pytest.raises(InputError, match="no labels"):
        load_labelled(tmp_path / "bare.npz", elastic_nets.PREPROCESS)


def test_batches_are_never_of_one_picture():
    images, labels = elastic_nets.digits()
    data = Labelled(labels, lambda i: images[i])
    sizes = [len(b) for b in data.batches(elastic_nets.PREPROCESS, np.arange(9), 4)]
    assert sizes == [4, 5]


def test_a_diverging_training_says_so(fresh):
    net = Supernet.restore(fresh.captured, fresh.space, fresh.trainable, fresh.state())
    images, labels = elastic_nets.digits()
    trainer = Trainer(net, Training(10, 16, augment=False))
    with torch.no_grad():
        net.constants["head.weight"].fill_(float("nan"))
    with pytest.raises(ModelError, match=r"diverged at step 0.*lower --lr"):
        trainer.advance(Labelled(labels, lambda i: images[i]), np.arange(100), elastic_nets.PREPROCESS)


def plainly_rounded(net: Supernet, x: np.ndarray, bits: int) -> np.ndarray:
    """What the exporter does at so few bits without a training: largest weight, smallest and largest value."""
    graph = net.graph
    seen: dict[str, tuple[float, float]] = {}

    def watch(value, t):
        seen[value] = (min(0.0, float(t.min())), max(0.0, float(t.max())))
        return t

    with torch.no_grad():
        for batch in batches(x[:128], 128):
            run(graph, batch, float_parameters(graph), watch)
    weights, scales = {}, {}
    for p in net.layout.layers:
        weights[p.output] = quantise_weights(net.weight_of(p.name).numpy(), 8 if p.pinned else bits, 127)
    for v in net.layout.values:
        low, high = seen[v.name]
        levels = 256 if v.pinned else 2**bits
        step = (high - low) / (levels - 1)
        scales[v.name] = Scale(step, round(-low / step), levels)
    with torch.no_grad():
        parameters = dequantised_parameters(graph, weights)
        return np.concatenate([run(graph, b, parameters, simulated(scales)).numpy() for b in batches(x, 128)])


def test_four_bits_after_a_short_training_beat_plain_rounding():
    model = elastic_nets.trained()
    program = program_of(model, 16, 16)
    images, labels = elastic_nets.digits()
    data, x = Labelled(labels, lambda i: images[i]), elastic_nets.PREPROCESS.apply(images)
    space = Space((3, 4, 8), (3, 4, 8), (True,), (True,), (False,))
    net = Supernet.build(capture(program, 16, 16), space, program.graph_signature.parameters, x[:256])
    test, truth = x[1200:], labels[1200:]
    plain = float((plainly_rounded(net, test, 4).argmax(1) == truth).mean())
    trainer = Trainer(net, Training(60, 64, 3e-3, augment=False))
    train(trainer, data, Split(np.arange(1200), np.arange(1200, 1797)), elastic_nets.PREPROCESS)
    frozen = freeze(net, space.uniform(net.layout, 4, 4), batches(x[:256], 128))
    trained = float((frozen.logits(batches(test, 128)).argmax(1) == truth).mean())
    assert trained > plain + 0.03, (trained, plain)
    assert trainer.losses[0][2] > np.mean([row[2] for row in trainer.losses[-10:]])


ARGUMENTS = ["--preprocess", elastic_nets.PREPROCESS_TEXT, "--steps", "14", "--batch", "16", "--checkpoint-every", "2",
             "--measure", "20", "--elastic", "w2/8,a4,per-channel", "--json"]  # fmt: skip


def test_a_killed_training_ends_as_if_nothing_had_happened(files, tmp_path):
    from refold.cli import main

    weights, pictures = files
    args = ["export", "train", MODEL, "--weights", str(weights), "--data", str(pictures), *ARGUMENTS]
    main([*args, "-o", str(tmp_path / "whole")])
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "refold.cli", *args, "-o", str(killed)], cwd=Path(__file__).parents[3],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first = ""
    try:
        while process.poll() is None:
            if (killed / "checkpoint.pt").is_file():
                step = RunFolder(killed).checkpoint().step
                if step >= 2:
                    process.send_signal(signal.SIGKILL)
                    break
            time.sleep(0.02)
        process.wait()
        first = (process.stderr.read() if process.stderr else b"").decode()
    finally:
        process.kill()
        if process.stderr:
            process.stderr.close()
    assert process.returncode == -signal.SIGKILL, first
    stopped = RunFolder(killed).checkpoint()
    assert 2 <= stopped.step < 14 and stopped.step % 2 == 0
    main([*args, "-o", str(killed)])
    one, two = RunFolder(tmp_path / "whole").checkpoint(), RunFolder(killed).checkpoint()
    assert one.step == two.step == 14 and one.losses == two.losses
    assert set(one.state) == set(two.state)
    for name, tensor in one.state.items():
        assert torch.equal(tensor, two.state[name]), name
    for key, held in one.optimiser["state"].items():
        for what, tensor in held.items():
            assert torch.equal(tensor, two.optimiser["state"][key][what]), what


def test_a_run_is_not_continued_with_other_settings(finished, files, capsys):
    from refold.cli import main

    weights, pictures = files
    with pytest.raises(SystemExit) as e:
        main(["export", "train", MODEL, "--weights", str(weights), "--data", str(pictures), "--preprocess",
              elastic_nets.PREPROCESS_TEXT, "--steps", "30", "--batch", "32", "--lr", "0.003", "--no-augment",
              "-o", str(finished.path)])  # fmt: skip
    assert e.value.code == 2 and "other settings (batch)" in capsys.readouterr().err


def test_settings_and_checkpoints_survive_and_damage_is_told(finished, tmp_path):
    settings = finished.settings()
    assert Settings.from_json(settings.to_json()) == settings
    run_folder = RunFolder(tmp_path)
    run_folder.save(Checkpoint(3, {"a": torch.ones(2)}, {}, [[1.0, 2.0]] * 3))
    again = run_folder.checkpoint()
    assert again.step == 3 and torch.equal(again.state["a"], torch.ones(2)) and again.losses == [[1.0, 2.0]] * 3
    data = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged"):
        run_folder.checkpoint()
    (tmp_path / "settings.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="damaged or of another version"):
        run_folder.settings()
    with pytest.raises(InputError, match=r"no settings\.json"):
        RunFolder(tmp_path / "nowhere").settings()


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch": 1}, {"lr": 0.0}, {"lam": 2.0}, {"subnets": 1}, {"kurtosis": -1.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(UsageError):
        Training(**{"steps": 5, **bad})
