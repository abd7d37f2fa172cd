"""The lens benchmark without its networks: what is added is without effect at the start and learns, its cost, the table."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.corrupt import NAMES
from bench.lens import pieces, run
from bench.lens.candidates import CANDIDATES, NORMS, RANK, Candidate, Lens
from bench.lens.cases import CASES, DECIDING, FULL, QUICK, Scale
from bench.lens.compute import cost, layers
from bench.lens.pieces import Piece, TableTeachers, Work
from bench.lens.report import BOTH, best_rate, claims, gain, plot
from bench.result import Options
from cloud.distil import DistilSettings, Teacher, Teachers
from refold.errors import UsageError
from refold.preprocess import Preprocess


class Small(nn.Module):
    """Three convolutions, the second of every channel alone; input (N, 3, 9, 9), an odd side at stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.each = nn.Conv2d(6, 6, 3, 1, 1, groups=6)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.each(self.first(x))))
        return out.mean((2, 3))


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_a_candidate_changes_nothing_until_it_learns(candidate: Candidate) -> None:
    x = torch.randn(4, 3, 9, 9)
    small = Small()
    program = torch.export.export(small, (x,)).module()
    added = candidate.add(program, 2.0)
    before = program(x)
    assert torch.equal(before, small(x))
    before.square().sum().backward()
    reached = [p for p in added if p.grad is not None and p.grad.any()]
    assert len(reached) == (len(added) if candidate.name == "lens" else len(added) // 2), "B learns first: A's gradient is B's"
    with torch.no_grad():
        for p in added:
            p.add_(0.1)
    assert not torch.allclose(program(x), before)
    count = sum(p.numel() for p in added)
    assert count == (78 if candidate.name == "lens" else RANK * (3 + 6 + 6 + 4)), "a depthwise convolution gets no branch"


def test_a_lens_is_the_filter_its_numbers_say() -> None:
    lens = Lens(3, factor=2.0)
    with torch.no_grad():
        lens.kernel[1, 0, 2, 3] = 0.25  # the right neighbour
        lens.bias[2] = 0.5
    x = torch.randn(2, 3, 8, 8)
    wanted = x.clone()
    wanted[:, 1, :, :-1] += 0.5 * x[:, 1, :, 1:]
    wanted[:, 2] += 1.0
    torch.testing.assert_close(lens(x), wanted)


def test_costs_are_counted_by_hand() -> None:
    found = layers(Small().to("meta"), 9)
    assert [layer.multiply_adds for layer in found] == [25 * 6 * 27, 25 * 6 * 9, 25 * 4 * 6]
    lens, branches = cost("lens", "ResNet-20"), cost("low-rank", "ResNet-20")
    assert lens.numbers == 78
    widths = [(3, 16), *[(16, 16)] * 6, (16, 32), *[(32, 32)] * 5, (32, 64), *[(64, 64)] * 5]
    assert branches.numbers == RANK * sum(a + b for a, b in widths)
    assert lens.share == pytest.approx(100 * 75 * 1024 / 40.55e6, rel=0.01), "ResNet-20 has 40.55 million (He et al. 2016)"


def test_the_error_is_that_of_the_mean_of_fixed_corruptions() -> None:
    value, error = gain({("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 0.0, ("b", 1): 0.0})
    assert value == 1.0
    assert error == pytest.approx(math.sqrt(2.0 / 2) / 2)
    assert math.isnan(gain({("a", 0): 1.0})[1])
    assert math.isnan(gain({})[0])


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_nothing_is_chosen_on_what_is_reported(scale: Scale) -> None:
    assert not set(scale.report) & set(scale.development)
    assert set(scale.report) | set(scale.development) <= set(NAMES)
    assert scale.development_seed not in range(Options().seed, Options().seed + scale.seeds)
    assert max(c.uploads for c in scale.cases) <= scale.uploads


def made_up(work: Work, scale: Scale) -> Piece:
    """A lens worth one point with predictions, ten where it was tuned at 2e-2; low-rank branches worth half a point less."""
    value = 70.0 + work.seed % 100
    if work.candidate != NORMS:
        value += {True: 10.0 if work.rate == 2e-2 else 0.0, False: 1.0}[work.corruption in scale.development]
        value -= 1.5 if work.candidate == "low-rank" else 0.0
    return Piece(work, value, 1.0, 0.5, 0.1)


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Work]:
    done: list[Work] = []

    def fake(work: Work, scale: Scale) -> Piece:
        done.append(work)
        piece = made_up(work, scale)
        pieces.KEEPER.store(pieces._asked(work, scale), asdict(piece))
        return piece

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pieces, "_run", fake)
    return done


def test_a_whole_run_pairs_candidates_with_norms_alone(no_networks: list[Work], tmp_path: Path) -> None:
    result = run(Options(target=tmp_path / "l.json"))
    lines = {(line["case"], line["row"]): line for line in result.rows}
    assert len(lines) == 3 * 3 + 2 * 2, "two deciding cases and their mean with all rows; two more with the first candidate"
    assert (lines[BOTH, "lens"]["gain"], lines[BOTH, "lens"]["± (standard error)"]) == (1.0, 0.0)
    assert lines[BOTH, "lens"]["rate"] == 2e-2
    assert (lines[BOTH, NORMS]["mean"], "gain" in lines[BOTH, NORMS]) == (71.0, False)
    found = {c.id: c for c in result.claims}
    assert (found["lens.gain"].value, found["lens.gain"].holds) == (1.0, True)
    assert (found["low-rank.gain"].value, found["low-rank.gain"].holds) == (-0.5, False)
    assert not any(w.rate in (2e-3, 6e-3) for w in no_networks if w.corruption in FULL.report)
    plot(result, tmp_path / "l.png")
    assert (tmp_path / "l.png").stat().st_size > 1000
    count = len(no_networks)
    again = run(Options(target=tmp_path / "l.json", resume=True))
    assert (len(no_networks), again.rows) == (count, result.rows), "a run goes on where it stopped"


def test_a_quick_run_of_one_candidate(no_networks: list[Work], tmp_path: Path) -> None:
    result = run(Options(target=tmp_path / "l.json", quick=True, only=("low",)))
    assert {line["row"] for line in result.rows} == {NORMS, "low-rank"}
    plot(result, tmp_path / "l.png")
    with pytest.raises(UsageError, match=r"No candidate is called like magic; there are lens, low-rank"):
        run(Options(only=("magic",)))


def test_claims_without_their_rows_hold_nothing_but_what_was_counted() -> None:
    assert {c.id for c in claims([], ["lens"]) if c.holds} == {"lens.compute.ResNet-20", "lens.compute.Lite0"}
    assert not any(c.holds for c in claims([], ["low-rank"]) if not c.id.endswith("ResNet-20"))


def test_the_best_rate_is_that_of_the_mean() -> None:
    found = [
        Piece(Work("a", r, c, 0, "x"), v, 1, 0, 0) for r, c, v in ((1, "x", 9.0), (1, "y", 1.0), (2, "x", 6.0), (2, "y", 6.0))
    ]
    assert best_rate("a", found) == 2


def test_known_answers_follow_their_images() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    like = Teachers([Teacher("t", lambda x: x)], Preprocess(4, 4), DistilSettings())
    table = TableTeachers(like, images, np.eye(3, dtype=np.float32))
    table.adapt("d", images)
    np.testing.assert_array_equal(table.probabilities(images[[2, 0]], "d"), np.eye(3, dtype=np.float32)[[2, 0]])
    with pytest.raises(KeyError):
        table.probabilities(images + 1)


def test_cases_differ_in_name_and_the_deciding_ones_are_the_product_s() -> None:
    assert len({c.name for c in CASES}) == len(CASES)
    assert all(c.restyled and not c.labels for c in DECIDING)
    assert CASES[: len(DECIDING)] == DECIDING
