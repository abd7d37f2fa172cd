"""The published methods on a small random network: each does what its paper's arithmetic says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from adaptation_nets import small_net
from torch import nn

from bench.adaptation.baselines import EATA, AlphaBN, Source, SupervisedOracle, Tent, fisher_information
from bench.adaptation.cema import CEMA, PAPER, RELEASED, Cloud, UploadRule
from bench.adaptation.nets import AdaptableNorm, Statistics, adaptable, affine_parameters, entropy, norms, to_input
from refold.errors import ModelError


@pytest.fixture
def frames() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (96, 16, 16, 3), np.uint8), rng.integers(0, 10, 96)


def test_source_statistics_compute_the_network_itself(frames: tuple[np.ndarray, np.ndarray]) -> None:
    net = small_net()
    x = to_input(frames[0])
    with torch.no_grad():
        assert torch.allclose(adaptable(net, Statistics.SOURCE)(x), net(x), atol=1e-5)
        batch = adaptable(net, Statistics.BATCH)(x)
        assert torch.allclose(adaptable(net, Statistics.MIXED, 1.0)(x), batch, atol=1e-4)
        assert torch.allclose(adaptable(net, Statistics.MIXED, 0.0)(x), net(x), atol=1e-5)
        assert torch.allclose(net.train()(x), batch, atol=1e-4)
    assert not any(p.requires_grad for n, p in adaptable(net, Statistics.BATCH).named_parameters() if n.startswith(("0", "8")))


def test_mixed_statistics_have_gradients_and_the_same_values(frames: tuple[np.ndarray, np.ndarray]) -> None:
    x = to_input(frames[0])
    mixed = adaptable(small_net(), Statistics.MIXED, 0.5)
    with torch.no_grad():
        expected = mixed(x)
    logits = mixed(x)
    assert torch.allclose(logits, expected, atol=1e-4)
    entropy(logits).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in affine_parameters(mixed))
    whole, batch = adaptable(small_net(), Statistics.MIXED, 1.0), adaptable(small_net(), Statistics.BATCH)
    for net in (whole, batch):
        entropy(net(x)).mean().backward()
    for a, b in zip(affine_parameters(whole), affine_parameters(batch), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    tent = EATA(small_net(), x, lr=1e-2, batch=96, margin=2.0, alpha=0.5)
    before = [p.clone() for p in affine_parameters(tent.net)]
    tent.run(*frames)
    assert any(not torch.equal(a, b) for a, b in zip(before, affine_parameters(tent.net), strict=True))


def test_a_network_without_norms_is_refused() -> None:
    with pytest.raises(ModelError):
        adaptable(nn.Sequential(nn.Conv2d(3, 4, 3)), Statistics.BATCH)
    with pytest.raises(ModelError):
        adaptable(nn.Sequential(nn.BatchNorm2d(4, affine=False)), Statistics.BATCH)


def test_renormalisation_gives_running_statistics_and_batch_gradients() -> None:
    """The value is (x - running mean) / running deviation in both modes; only the gradient knows the batch."""
    torch.manual_seed(0)
    norm = AdaptableNorm(nn.BatchNorm2d(4), Statistics.RENORM)
    norm.weight.data.uniform_(0.5, 1.5)
    first, x = torch.randn(16, 4, 5, 5) * 2 + 1, torch.randn(8, 4, 5, 5, requires_grad=True)
    norm.eval()(first)
    assert torch.allclose(norm.running_mean, first.mean((0, 2, 3)))  # seeded by what it sees first, not by the source
    expected = norm.eval()(x)
    mean_before = norm.running_mean.clone()
    y = norm.train()(x)
    assert torch.allclose(y, expected, atol=1e-5)
    y.square().sum().backward()
    batch_gradient = x.grad.mean((0, 2, 3))
    assert torch.allclose(batch_gradient, torch.zeros(4), atol=1e-4)  # a batch norm's gradient has no mean
    assert torch.allclose(norm.running_mean, 0.9 * mean_before + 0.1 * x.detach().mean((0, 2, 3)), atol=1e-6)
    frozen = norm.running_mean.clone()
    norm.eval()(first)
    assert torch.equal(norm.running_mean, frozen)


def test_entropy_is_in_nats() -> None:
    assert entropy(torch.zeros(2, 10)).tolist() == pytest.approx([math.log(10)] * 2)
    assert entropy(torch.tensor([[100.0, 0, 0]])).item() == pytest.approx(0, abs=1e-6)


def test_predictions_come_before_adapting_and_every_frame_gets_one(frames: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = frames
    expected, log = Source(small_net(), Statistics.BATCH, batch=96).run(images, labels)
    for method in (Tent(small_net(), lr=0.5, batch=96), SupervisedOracle(small_net(), lr=0.5, batch=96)):
        predictions, _ = method.run(images, labels)
        assert np.array_equal(predictions, expected)
        assert not np.array_equal(method.run(images, labels)[0], expected)
    ragged, _ = AlphaBN(small_net(), alpha=0.5, batch=40).run(images, labels)
    assert ragged.shape == (96,) and ragged.dtype == np.int64
    assert log["frames_uploaded"] == log["bytes_up"] == log["bytes_down"] == 0


def test_tent_lowers_entropy_through_affine_parameters_alone(frames: tuple[np.ndarray, np.ndarray]) -> None:
    tent = Tent(small_net(), lr=1e-2, batch=96)
    x = to_input(frames[0])
    before = {n: p.clone() for n, p in tent.net.named_parameters()}
    start = entropy(tent.net(x)).mean().item()
    for _ in range(8):
        tent.step(x, torch.zeros(0))
    assert entropy(tent.net(x)).mean().item() < start - 0.02
    moved = {n for n, p in tent.net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_the_oracle_learns_labels(frames: tuple[np.ndarray, np.ndarray]) -> None:
    oracle = SupervisedOracle(small_net(), lr=2e-2, batch=96)
    x, labels = to_input(frames[0]), torch.from_numpy(frames[1])
    losses = [nn.functional.cross_entropy(oracle.step(x, labels), labels).item() for _ in range(15)]
    assert losses[-1] < losses[0] - 0.1


def test_eata_drops_uncertain_and_redundant_samples() -> None:
    eata = EATA(small_net(), torch.randn(64, 3, 16, 16), redundancy=0.4)
    logits = torch.zeros(4, 10)
    logits[0, 0] = logits[1, 0] = logits[2, 5] = 9.0  # sure of 0, of 0 again, of 5; row 3 knows nothing
    assert eata.select(logits).tolist() == [0, 1, 2]  # the first batch has nothing to be redundant to
    mean = eata.mean_probabilities.clone()
    assert mean == pytest.approx(logits.softmax(1)[:3].mean(0), abs=1e-6)
    assert eata.select(logits[[0, 3]]).tolist() == []  # cosine of class 0 to the mean is about 0.9
    assert torch.equal(eata.mean_probabilities, mean)  # nothing kept: unmoved
    other = torch.zeros(1, 10)
    other[0, 7] = 9.0
    assert eata.select(other).tolist() == [0]
    assert torch.allclose(eata.mean_probabilities, 0.9 * mean + 0.1 * other.softmax(1)[0])


def test_eata_is_held_by_fisher_information(frames: tuple[np.ndarray, np.ndarray]) -> None:
    x = to_input(frames[0])
    free, held = (EATA(small_net(), x, lr=1e-2, batch=96, margin=2.0, redundancy=2.0, fisher=f) for f in (0.0, 1e4))
    for method in (free, held):
        for _ in range(10):
            method.counts = {}
            method.step(x, torch.zeros(0))
    drift = [
        sum((f * (p - a).square()).sum().item() for f, p, a in zip(m.fisher, affine_parameters(m.net), m.anchor, strict=True))
        for m in (free, held)
    ]
    assert drift[1] < drift[0]
    assert free.counts["frames_learnt_from"] == 96


def test_fisher_information_is_the_mean_of_squared_batch_gradients() -> None:
    net = adaptable(small_net(), Statistics.BATCH)
    clean = torch.randn(8, 3, 16, 16)
    whole, halves = fisher_information(net, clean, batch=8), fisher_information(net, clean, batch=4)
    logits = net(clean)
    expected = torch.autograd.grad(nn.functional.cross_entropy(logits, logits.argmax(1)), affine_parameters(net))
    assert all(torch.allclose(a, b.square()) for a, b in zip(whole, expected, strict=True))
    parts = [fisher_information(net, c, batch=4) for c in clean.split(4)]
    assert all(torch.allclose(h, (a + b) / 2) for h, a, b in zip(halves, *parts, strict=True))


def test_cema_paper_thresholds_follow_the_mean_entropy() -> None:
    """E_max^t = 0.4 ln C * mean entropy so far / mean entropy at the end of the warm-up; the batch counts before its test."""
    rule = UploadRule(replace(PAPER, warm_up=4), classes=10)
    uncertain, sure = torch.zeros(2, 10), torch.zeros(2, 10)
    sure[:, 0] = 4.0
    high, low = math.log(10), float(entropy(sure)[0])
    assert rule.ceiling == pytest.approx(0.4 * math.log(10))
    assert rule.select(uncertain).tolist() == [] and rule.warm_mean is None
    rule.select(sure)
    assert rule.warm_mean == pytest.approx((high + low) / 2)
    rule.select(sure)
    assert rule.ceiling == pytest.approx(0.4 * math.log(10) * ((high + 2 * low) / 3) / ((high + low) / 2))
    certain = torch.zeros(1, 10)
    certain[0, 0] = 60.0  # below E_min = 0.02 ln C: teaches nothing
    assert rule.select(certain).tolist() == []


def test_cema_released_uses_redundancy_and_a_fixed_threshold() -> None:
    rule = UploadRule(RELEASED, classes=10)
    sure = torch.zeros(1, 10)
    sure[0, 0] = 30.0
    assert rule.select(sure).tolist() == [0]  # no lower bound
    assert rule.select(sure).tolist() == []  # the same again is redundant
    other = torch.zeros(1, 10)
    other[0, 3] = 30.0
    assert rule.select(other).tolist() == [0]
    assert rule.ceiling == pytest.approx(0.4 * math.log(10))


def cloud(**changes: object) -> Cloud:
    settings = replace(RELEASED, **{"group": 4, "replay_from": 12, "history": 20, "idle_batch": 8, **changes})
    return Cloud(adaptable(small_net(), Statistics.RENORM), adaptable(small_net(1), Statistics.RENORM), settings, 10)


def test_cema_buffers_count_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of `group`; a remainder waits; replay of three old for one new once the history has `replay_from`; oldest out."""
    c = cloud()
    batches: list[int] = []
    taught: list[int] = []
    distil, teach = c._distil, c._teach
    monkeypatch.setattr(c, "_distil", lambda x: (batches.append(len(x)), distil(x))[1])
    monkeypatch.setattr(c, "_teach", lambda x: (taught.append(len(x)), teach(x))[1])
    pictures = torch.randn(40, 3, 16, 16)
    assert c.receive(pictures[:3]) == 0 and batches == []
    assert c.receive(pictures[3:6]) == 1 and batches == [4] and len(c.waiting) == 2 and len(c.history) == 6
    assert c.receive(pictures[6:13]) == 2 and batches == [4, 4 + 12, 4 + 12] and len(c.waiting) == 1
    assert c.receive(pictures[13:14]) == 1 and batches[-1] == 8  # idle round: replay alone, and no teacher step
    assert taught == [4, 4, 4]
    c.receive(pictures[14:40])
    assert len(c.history) == 20 and torch.equal(c.history[0], pictures[20])


def test_cema_teacher_moves_first_and_the_student_follows_it(frames: tuple[np.ndarray, np.ndarray]) -> None:
    c = cloud(student_lr=0.02, beta=3.0, alpha=0.0, replay_from=10_000)
    x = to_input(frames[0])
    c.receive(x[:4])
    teacher_before = [p.clone() for p in affine_parameters(c.teacher)]

    def gap() -> float:
        with torch.no_grad():
            student, teacher = c.student(x).log_softmax(1), c.teacher(x).log_softmax(1)
            return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True).item()

    start = gap()
    for i in range(4, 96, 4):
        c.receive(x[i : i + 4])
    assert gap() < start
    assert any(not torch.equal(a, b) for a, b in zip(teacher_before, affine_parameters(c.teacher), strict=True))
    assert not c.student.training and not c.teacher.training


def test_cema_edge_serves_what_the_cloud_sent(frames: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = frames
    settings = replace(PAPER, batch=16, group=4, replay_from=16, margin=2.0, low_margin=None)
    cema = CEMA(small_net(), small_net(1), settings)
    predictions, log = cema.run(images, labels)
    assert predictions.shape == (96,)
    assert log["frames_uploaded"] == 96 and log["bytes_up"] == 96 * 16 * 16 * 3
    assert log["bytes_down"] == 6 * 8 * (8 + 16)  # six rounds, two floats a channel
    for edge, student in zip(norms(cema.edge), norms(cema.cloud.student), strict=True):
        assert torch.equal(edge.weight, student.weight) and torch.equal(edge.running_mean, student.running_mean)
        assert edge.seeded and student.seeded


def test_cema_with_nothing_uploaded_is_batch_statistics_of_its_first_batch(frames: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = frames
    cema = CEMA(small_net(), small_net(1), replace(RELEASED, margin=0.0, batch=96))
    predictions, log = cema.run(images, labels)
    assert log["frames_uploaded"] == log["bytes_down"] == 0
    assert np.array_equal(predictions, Source(small_net(), Statistics.BATCH, batch=96).run(images, labels)[0])
