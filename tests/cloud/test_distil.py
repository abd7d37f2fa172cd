"""The distiller end to end on a small trained net: what it learns helps, is admissible, and repeats itself."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from distil_bundles import SmallNet, bundle_of

from cloud.distil import Candidate, Distiller, DistilSettings, Student, Teacher, Teachers
from cloud.distil.recipe import SHARES, convincing, lessons
from cloud.distil.samples import DomainEvidence
from refold import Bundle, NormState
from refold.errors import InputError, UsageError
from refold.preprocess import Preprocess
from refold.v1 import samples_pb2 as pb

U8 = NDArray[np.uint8]
PREPROCESS = Preprocess(16, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
FAST = {"steps": 20, "group": 32, "fresh_samples": 32}


def pictures(count: int, seed: int) -> tuple[U8, NDArray[np.int64]]:
    """Four classes of gratings on random backgrounds: learnt within seconds, lost under noise and low contrast."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    y, x = np.mgrid[0:16, 0:16] / 16
    waves = np.stack(
        [np.sin(2 * np.pi * 2 * x), np.sin(2 * np.pi * 2 * y), np.sin(2 * np.pi * 2 * (x + y)), np.cos(4 * np.pi * x * y)]
    )
    phase = rng.choice([-1, 1], (count, 1, 1, 1))
    grey = waves[labels][..., None] * phase * 28 + rng.uniform(90, 170, (count, 1, 1, 3))
    return np.clip(grey + rng.normal(0, 14, (count, 16, 16, 3)), 0, 255).astype(np.uint8), labels


def noisy(images: U8, seed: int = 9) -> U8:
    low = 40 + images * 0.45
    return np.clip(low + np.random.default_rng(seed).normal(0, 26, images.shape), 0, 255).astype(np.uint8)


def trained(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = SmallNet(4, width).train()
    images, labels = pictures(512, 0)
    x, y = torch.from_numpy(PREPROCESS.apply(images)), torch.from_numpy(labels)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        pick = torch.randint(0, len(x), (64,))
        loss = nn.functional.cross_entropy(net(x[pick]), y[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for p in net.parameters():
        p.requires_grad_(False)
    return net.eval()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    images, labels = pictures(128, 1)
    return bundle_of(trained(6, 0), tmp_path_factory.mktemp("distil") / "s.refold", PREPROCESS, images, labels, 4)


@pytest.fixture(scope="module")
def teachers() -> Teachers:
    return Teachers([Teacher("wide", trained(16, 1)), Teacher("other", trained(12, 2))], PREPROCESS)


def distiller(bundle: Bundle, teachers: Teachers, count: int = 96, **settings: object) -> Distiller:
    made = Distiller(bundle, teachers, DistilSettings.of({**FAST, **settings}))
    made.add_samples(noisy(pictures(count, 5)[0]), "d1", np.ones(count, bool))
    return made


def accuracy(bundle: Bundle, candidate: Candidate | None) -> float:
    student = Student(bundle)
    student.load(candidate.states if candidate else {})
    images, labels = pictures(400, 6)
    with torch.no_grad():
        logits = student.logits(torch.from_numpy(PREPROCESS.apply(noisy(images, 10))))
    return float((logits.argmax(1).numpy() == labels).mean())


def test_a_candidate_is_admissible_and_better_in_its_domain(bundle: Bundle, teachers: Teachers) -> None:
    made = distiller(bundle, teachers)
    assert made.ready() == ["d1"]
    candidate = made.train("d1")
    assert made.ready() == []
    bundle.norms.check(candidate.states)
    bundle.norms.tensors(candidate.states, candidate.activations)
    assert candidate.domain == "d1"
    assert candidate.samples == 96
    assert accuracy(bundle, candidate) > accuracy(bundle, None) + 0.1
    assert candidate.metrics["unexplained"] < 0.5
    assert candidate.metrics["restyled"] > 0


def test_the_same_samples_and_seed_give_the_same_candidate(bundle: Bundle, teachers: Teachers) -> None:
    first, again = (distiller(bundle, teachers).train("d1") for _ in range(2))
    assert first.states == again.states
    other = distiller(bundle, teachers, seed=1).train("d1")
    assert first.metrics["loss_last"] != other.metrics["loss_last"]


def test_a_training_does_not_depend_on_other_domains_trained_before(bundle: Bundle, teachers: Teachers) -> None:
    made = distiller(bundle, teachers)
    made.add_samples(pictures(40, 7)[0] // 3, "d2", np.ones(40, bool))
    made.train("d2")
    assert made.train("d1").states == distiller(bundle, teachers).train("d1").states


def test_it_is_ready_when_a_domain_has_grown_enough(bundle: Bundle, teachers: Teachers) -> None:
    made = distiller(bundle, teachers, 31, growth=2.0)
    assert made.ready() == []
    made.add_samples(noisy(pictures(1, 8)[0]), "d1", np.zeros(1, bool))
    assert made.ready() == ["d1"]
    made.train("d1")
    made.add_samples(noisy(pictures(31, 8)[0]), "d1", np.zeros(31, bool))
    assert made.ready() == []
    made.add_samples(noisy(pictures(1, 8)[0]), "d1", np.zeros(1, bool))
    made.add_samples(pictures(200, 8)[0], "d2", np.zeros(200, bool))
    assert made.ready() == ["d2", "d1"]
    with pytest.raises(UsageError, match="no samples"):
        made.train("d9")


def report_of(bundle: Bundle, images: U8, domain: str = "d1") -> pb.StatisticsReport:
    student = Student(bundle)
    x = torch.from_numpy(PREPROCESS.apply(images))
    moments = student.observe(x, student.population(x).measure())
    report = pb.StatisticsReport(domain=domain, frames=len(images), digest=f"{images.sum()}")
    for site, m in zip(student.measured, moments, strict=True):
        report.sites.add(site=site.name, mean=m.mean.tolist(), variance=m.variance.tolist())
    return report


def test_reports_give_the_statistics_where_unbiased_samples_are_few(bundle: Bundle, teachers: Teachers) -> None:
    selected = noisy(pictures(64, 5)[0])
    made = Distiller(bundle, teachers, DistilSettings.of({**FAST, "restyled": 0.0}))
    made.add_samples(selected, "d1", np.zeros(64, bool))
    made.add_statistics(report_of(bundle, noisy(pictures(200, 11)[0])))
    candidate = made.train("d1")
    assert candidate.statistics_frames == 200
    assert accuracy(bundle, candidate) > accuracy(bundle, None)
    assert candidate.metrics["restyled"] == 0


def test_held_back_uploads_decide_how_far_to_go(bundle: Bundle, teachers: Teachers) -> None:
    class Noise(Teachers):
        def probabilities(self, images: U8, domain: str = "") -> NDArray[np.float32]:
            p = np.random.default_rng(3).dirichlet(np.ones(4) * 0.3, len(images))
            return p.astype(np.float32)

    made = Distiller(bundle, Noise(teachers.teachers, PREPROCESS), DistilSettings.of({**FAST, "restyled": 0.0, "steps": 60}))
    made.add_samples(noisy(pictures(96, 5)[0]), "d1", np.ones(96, bool))
    candidate = made.train("d1")
    assert candidate.metrics["share"] in SHARES
    worse = Distiller(bundle, Noise(teachers.teachers, PREPROCESS), DistilSettings.of({**FAST, "restyled": 0.0, "rate": 0.5}))
    worse.add_samples(noisy(pictures(96, 5)[0]), "d1", np.ones(96, bool))
    assert worse.train("d1").metrics["held_back_loss"] <= candidate.metrics["held_back_loss_before"] + 0.5


def test_sure_votes_are_sharpened_and_weigh_more() -> None:
    votes = np.array([[0.6, 0.4], [0.9, 0.1]], np.float32)
    taught = lessons(votes, DistilSettings(sharpen=2.0, trust=3.0))
    weights = taught.sum(1)
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights[1] / weights[0]) == pytest.approx((0.9 / 0.6) ** 3, rel=1e-5)
    assert float(taught[0, 0] / taught[0, 1]) == pytest.approx((0.6 / 0.4) ** 2, rel=1e-5)
    alike = lessons(votes, DistilSettings(sharpen=1.0, trust=0.0))
    assert torch.allclose(alike, torch.from_numpy(votes))


def test_a_choice_must_convince() -> None:
    usual, lucky, better = (
        torch.tensor([1.0, 3.0, 1.0, 3.0]),
        torch.tensor([1.0, 2.0, 1.5, 3.2]),
        torch.tensor([0.5, 2.4, 0.4, 2.5]),
    )
    assert convincing([usual, lucky]) == 0
    assert convincing([usual, lucky, better]) == 2
    assert convincing([usual]) == 0


def test_a_training_goes_on_from_what_devices_serve(bundle: Bundle, teachers: Teachers) -> None:
    served = {
        s.name: NormState(s.exported.gamma * np.float32(1.1), s.exported.beta, s.exported.mean, s.exported.variance)
        for s in bundle.norms.norms
    }
    made = Distiller(bundle, teachers, DistilSettings.of({**FAST, "rate": 1e-9}))
    made.add_samples(noisy(pictures(64, 5)[0]), "d1", np.ones(64, bool))
    for start in (served, {}):
        candidate = made.train("d1", start)
        for site in bundle.norms.norms:
            wanted = start.get(site.name, site.exported).gamma
            assert np.allclose(candidate.states[site.name].gamma, wanted, atol=1e-5)


def test_a_bundle_without_calibration_labels_or_pictures_still_trains(tmp_path: Path, teachers: Teachers) -> None:
    images, _ = pictures(64, 1)
    for name, kept in (("unlabelled", images), ("empty", images[:0])):
        bare = bundle_of(trained(6, 0), tmp_path / f"{name}.refold", PREPROCESS, kept, np.zeros(0, np.int64), 4)
        candidate = distiller(bare, teachers, 48).train("d1")
        bare.norms.check(candidate.states)
        assert (candidate.metrics["restyled"] > 0) == (name == "unlabelled")


@pytest.mark.parametrize("recipe", ["cema-paper", "cema-released"])
def test_cema_steps_once_for_every_group_of_32(bundle: Bundle, teachers: Teachers, recipe: str) -> None:
    made = distiller(bundle, teachers, 100, recipe=recipe)
    before = [p.detach().clone() for t in teachers.teachers for p in t.network.parameters()]
    candidate = made.train("d1")
    assert candidate.metrics["steps"] == 3
    bundle.norms.check(candidate.states)
    after = [p for t in teachers.teachers for p in t.network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "teachers are lent, not changed"
    made.add_samples(noisy(pictures(28, 12)[0]), "d1", np.zeros(28, bool))
    further = made.train("d1")
    assert further.metrics["steps"] == 1
    assert further.states != candidate.states


def test_cema_replays_when_nothing_new_came(bundle: Bundle, teachers: Teachers) -> None:
    made = distiller(bundle, teachers, 320, recipe="cema-paper")
    assert made.train("d1").metrics["steps"] == 10
    assert made.train("d1").metrics["steps"] == 1


def test_settings_are_refused_by_name() -> None:
    for values, what in (({"stepz": 3}, "stepz"), ({"mix": 2}, "mix"), ({"recipe": "magic"}, "recipe")):
        with pytest.raises(UsageError, match=what):
            DistilSettings.of(values)


def test_samples_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    evidence = DomainEvidence(bundle.norms.norms, 10)
    with pytest.raises(InputError, match="uint8"):
        evidence.add(np.zeros((2, 16, 16, 3)), np.ones(2, bool))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="flagged"):
        evidence.add(np.zeros((2, 16, 16, 3), np.uint8), np.ones(3, bool))
    evidence.add(np.zeros((8, 16, 16, 3), np.uint8), np.ones(8, bool))
    with pytest.raises(InputError, match="do not fit"):
        evidence.add(np.zeros((1, 8, 8, 3), np.uint8), np.ones(1, bool))
    evidence.add(np.ones((8, 16, 16, 3), np.uint8), np.zeros(8, bool))
    assert len(evidence) == 10
    assert evidence.arrived == 16
    assert len(evidence.population(5)) == 2
    assert evidence.images[-1].max() == 1


def test_reports_are_counted_once_and_checked(bundle: Bundle) -> None:
    evidence = DomainEvidence(bundle.norms.norms, 10)
    assert evidence.reported() == []
    good = report_of(bundle, noisy(pictures(40, 3)[0]))
    assert evidence.report(good)
    assert not evidence.report(good)
    assert evidence.statistics_frames == 40
    assert np.allclose(evidence.reported()[0].mean.numpy(), good.sites[0].mean, atol=1e-5)
    for spoil, what in (
        (lambda r: r.sites.pop(), "fit the bundle"),
        (lambda r: r.sites[0].mean.append(1), "fit the bundle"),
        (lambda r: r.sites[0].variance.__setitem__(0, -1), "negative"),
        (lambda r: r.sites[0].mean.__setitem__(0, float("nan")), "not finite"),
        (lambda r: setattr(r, "frames", 0), "cannot be"),
    ):
        bad = report_of(bundle, noisy(pictures(41, 3)[0]))
        spoil(bad)
        with pytest.raises(InputError, match=what):
            evidence.report(bad)
