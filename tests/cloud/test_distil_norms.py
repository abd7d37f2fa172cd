"""Norm mode, student, restyling: batch norms under control in eager and exported networks, and the student's trust region."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from distil_bundles import SmallNet, bundle_of, student_program

from cloud.distil.norm_mode import Moments, NormMode, mix, observed_moments, population_moments, serve_moments
from cloud.distil.restyle import Style, unexplained
from cloud.distil.student import Student
from refold import Bundle, NormState
from refold.bundle import write_bundle
from refold.errors import BundleError, ModelError
from refold.preprocess import Preprocess
from refold.v1 import manifest_pb2 as pb

PREPROCESS = Preprocess(16, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def network() -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet().train()
    for _ in range(20):
        net(torch.randn(32, 3, 16, 16))
    return net.eval()


@pytest.fixture(scope="module")
def bundle(network: SmallNet, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    path = tmp_path_factory.mktemp("student") / "small.refold"
    return bundle_of(network, path, PREPROCESS, images, rng.integers(0, 4, 40), 4)


def exported(network: nn.Module) -> nn.Module:
    program = torch.export.export(
        network, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    return program.module()


@pytest.mark.parametrize("kind", ["eager", "exported"])
def test_population_statistics_at_weight_one_are_batch_normalisation(network: SmallNet, kind: str) -> None:
    net = network if kind == "eager" else exported(network)
    x = torch.randn(16, 3, 16, 16) * 2 + 1
    moments = population_moments(net, x, 1.0)
    assert len(moments) == 3
    with torch.no_grad():
        served = serve_moments(net, x, moments)
        batch = SmallNet()
        batch.load_state_dict(network.state_dict())
        expected = batch.train()(x)
    assert torch.allclose(served, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["eager", "exported"])
def test_weight_nought_and_no_moments_leave_the_network_as_it_is(network: SmallNet, kind: str) -> None:
    net = network if kind == "eager" else exported(network)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        plain = network(x)
        assert torch.allclose(serve_moments(net, x, population_moments(net, x * 9, 0.0)), plain, atol=1e-5)
        assert torch.allclose(serve_moments(net, x, ()), plain, atol=1e-6)


def test_a_mixture_has_the_moments_of_the_mixed_population() -> None:
    a, b = torch.randn(3000, 2, dtype=torch.float64), torch.randn(1000, 2, dtype=torch.float64) * 3 + 2
    both = torch.cat([a, b])
    one, two = (Moments(t.mean(0), t.var(0, unbiased=False)) for t in (a, b))
    mixed = mix(one, two, 0.25)
    assert torch.allclose(mixed.mean, both.mean(0))
    assert torch.allclose(mixed.variance, both.var(0, unbiased=False))


def test_a_norm_without_running_statistics_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ModelError, match="running statistics"), NormMode(lambda c: c.x):
        net(torch.randn(2, 3, 8, 8))


def test_the_student_starts_as_exported_and_returns_what_was_set(network: SmallNet, bundle: Bundle) -> None:
    student = Student(bundle)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(student.logits(x), network(x), atol=1e-5)
    states = {
        s.name: NormState(s.exported.gamma * 1.5, s.exported.beta + 1, s.exported.mean, s.exported.variance)
        for s in student.sites
    }
    student.load(states)
    moments = [Moments(torch.from_numpy(s.mean.copy()), torch.from_numpy(s.variance.copy())) for s in states.values()]
    assert student.states(moments) == states
    student.load({})
    assert student.states(student.exported_moments()) == bundle.norms.exported_states()


def test_gradients_reach_gamma_and_beta_and_nothing_else(bundle: Bundle) -> None:
    student = Student(bundle)
    x = torch.randn(6, 3, 16, 16)
    moments = student.population(x).measure(0.5)
    student.trainable(True)
    student.logits(x, moments).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters)
    assert len(student.parameters) == 2 * len(student.sites)
    assert all(not p.requires_grad for n, p in student._network.named_parameters() if not n.startswith("norms"))
    student.trainable(False)


def test_what_leaves_the_trust_region_is_brought_back(bundle: Bundle) -> None:
    student = Student(bundle)
    with torch.no_grad():
        for p in student.parameters:
            p.copy_(torch.randn_like(p) * 100)
    wild = [Moments(torch.randn(s.channels), torch.rand(s.channels) * 1e6) for s in student.measured]
    states = student.states(student.clamp(wild))
    bundle.norms.check(states)
    for site in student.sites:
        assert (np.sign(states[site.name].gamma) == np.sign(site.exported.gamma)).all()


def test_a_bundle_without_a_student_or_with_another_is_refused(network: SmallNet, tmp_path: Path) -> None:
    program, _ = student_program(network, 16)
    torch.manual_seed(1)
    _, table = student_program(SmallNet(width=4), 16)
    from refold.codec import table_to_pb

    manifest = pb.Manifest(name="x", class_count=4, preprocess=PREPROCESS.to_pb(), norms=table_to_pb(table))
    bare = write_bundle(tmp_path / "bare.refold", manifest, {})
    with pytest.raises(BundleError, match="carries no student"):
        Student(bare)
    manifest.student = "student.pt2"
    broken = write_bundle(tmp_path / "broken.refold", manifest, {"student.pt2": b"not a program"})
    with pytest.raises(BundleError, match="cannot be loaded"):
        Student(broken)
    del manifest.norms.sites[:]
    manifest.norms.sites.add(name="elsewhere", kind=2, channels=1, has_norm=True).exported.CopyFrom(
        table_to_pb(table).sites[0].exported
    )
    foreign = write_bundle(tmp_path / "foreign.refold", manifest, {"student.pt2": program})
    with pytest.raises(BundleError, match="elsewhere"):
        Student(foreign)


def blobs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=True) * 0.6 + 0.2


def spectrum(x: Tensor) -> Tensor:
    return (torch.fft.rfft2(x - x.mean((0, 2, 3), keepdim=True)).abs() ** 2).mean((0, 1))


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast"])
def test_restyled_pictures_have_the_domains_spectrum_and_mean(kind: str) -> None:
    source, other = blobs(200, 0), blobs(100, 1)
    generator = torch.Generator().manual_seed(2)
    if kind == "noise":
        domain = (other + torch.randn(other.shape, generator=generator) * 0.05).clamp(0, 1)
    elif kind == "blur":
        domain = nn.functional.avg_pool2d(nn.functional.pad(other, (2, 2, 2, 2), mode="reflect"), 5, 1)
    else:
        domain = (other - 0.5) * 0.2 + 0.6
    restyled = Style(source, domain)(source, generator)
    assert torch.allclose(restyled.mean((0, 2, 3)), domain.mean((0, 2, 3)), atol=0.02)
    ratio = spectrum(restyled) / spectrum(domain)
    assert 0.6 < float(ratio.median()) < 1.6
    assert (spectrum(source) / spectrum(domain)).log().abs().median() > 2 * ratio.log().abs().median()


def test_restyling_says_how_much_of_a_shift_it_explains(network: SmallNet) -> None:
    source, other = blobs(128, 0), blobs(128, 1)
    generator = torch.Generator().manual_seed(2)
    noise = (other + torch.randn(other.shape, generator=generator) * 0.1).clamp(0, 1)
    moments = population_moments(network, noise, 0.5)

    def seen(x: Tensor) -> list[Moments]:
        return observed_moments(network, x, moments)

    restyled = Style(source, noise)(source, generator)
    again = (blobs(128, 3) + torch.randn(other.shape, generator=generator) * 0.1).clamp(0, 1)
    assert unexplained(seen(noise), seen(restyled), seen(source), seen(again)) < 0.3
    assert unexplained(seen(noise), seen(source), seen(source), seen(again)) == pytest.approx(1.0)


def test_chance_between_two_samples_of_a_domain_is_not_held_against_restyling(network: SmallNet) -> None:
    few, source, again = blobs(6, 1), blobs(128, 0) * 0.5, blobs(6, 3)
    moments = population_moments(network, few, 0.5)
    seen = [observed_moments(network, x, moments) for x in (few, again, source, again)]
    assert unexplained(*seen) == 0.0
