"""Exactness and overhead measure what they say, on nets that take no time. No test looks at a measured time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench import exactness, overhead
from bench.bundles import Net, Subject, crops
from bench.exactness import random_states
from bench.models import MobileNetV2, ResNet50, photographs, sane
from bench.paired import Paired, paired
from bench.result import Result
from edge.engine import EngineFactory
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.norms import check_state
from refold.preprocess import Preprocess

ROOT = Path(__file__).resolve().parents[2]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    net = Net(Small, 32, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, "random", 24)
    module = sane(Small(), 3)  # type: ignore[arg-type]
    pictures = Pictures(photographs(24, 32), None)
    path = tmp_path_factory.mktemp("bench") / "small.refold"
    exported = export_model(module, path, Preprocess(32, 32, **net.preprocess), pictures, Options(min_agreement=0.0))
    return Subject("small", net, module, exported)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CIFAR-10 here: photographs' statistics are enough to compare an engine with itself."""
    monkeypatch.setattr("bench.bundles._pictures", lambda side, count, seed, split: photographs(count, side, seed))


def test_random_states_are_admissible_and_differ(net: Subject) -> None:
    table = net.bundle.norms
    for strength in exactness.STRENGTHS:
        states = random_states(table, strength, 1)
        assert set(states) == {s.name for s in table.norms}
        for site in table.norms:
            check_state(site, states[site.name])
            assert not np.array_equal(states[site.name].gamma, site.exported.gamma)
    assert random_states(table, 0.3, 5) == random_states(table, 0.3, 5) != random_states(table, 0.3, 6)


def test_every_state_is_its_own_export(net: Subject, pictures: None) -> None:
    counted = []
    row = exactness._compare(net, EngineFactory(net.bundle), 8, 0, lambda: counted.append(1))
    assert row["states"] == row["identical"] == 8 == len(counted)
    assert row["states that change the logits"] == 8  # it compares something: no state computes what another does
    assert row["integers"] == 8 * 27 + 8 * 9 + 16 * 8 + 6 * 16


def test_a_difference_is_seen(net: Subject, pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that keeps serving the exported norms is caught in every state."""
    from edge.serving import ServingState

    factory = EngineFactory(net.bundle)
    stale = factory.build(ServingState())
    monkeypatch.setattr(factory, "build", lambda serving: stale)
    row = exactness._compare(net, factory, 4, 0, lambda: None)
    assert row["identical"] == row["logits identical"] == 0 and row["tensors identical"] == 4


def test_sizes_times_and_claims_of_exactness(
    net: Subject, pictures: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(exactness.COUNT, "small", 3)
    factory = EngineFactory(net.bundle)
    row = {"net": "small", **exactness._compare(net, factory, 2, 0, lambda: None), **exactness._size(net)}
    row |= exactness._swap_time(net, factory, 2) | exactness._latency(net, factory, 2)
    assert row["release B"] > 32 * 4 * 4 and row["bundle B"] == net.bundle.size
    assert row["integer layers"] == row["expected integer layers"] == 4
    found = {c.id: c for c in exactness.claims([row])}
    assert found["exactness.small.identical"].holds
    assert not {c.id: c for c in exactness.claims([row | {"identical": 1}])}["exactness.small.identical"].holds
    result = exactness.Result("exactness", [row], list(found.values()), ["net"])
    exactness.plot(result, tmp_path / "e.png")
    assert (tmp_path / "e.png").stat().st_size > 5_000


def test_fp32_twin_computes_the_module(net: Subject) -> None:
    import onnxruntime as ort

    x = net.bundle.preprocess.apply(photographs(1, 32, 9))
    (logits,) = ort.InferenceSession(net.float_onnx, providers=["CPUExecutionProvider"]).run(None, {"input": x})
    with torch.no_grad():
        assert logits == pytest.approx(net.module(torch.from_numpy(x)).numpy(), abs=1e-3)


def test_pairs_alternate_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    times = paired(lambda: order.append("a"), lambda: order.append("b"), 3, before_each=lambda: order.append("."))
    assert "".join(order).replace(".", "") == "ba" + "ab" + "ba" + "ab" and order[::2] == ["."] * 8
    assert len(times.first) == len(times.second) == len(times.ratios) == 3
    assert Paired((2.0, 3.0, 4.0), (1.0, 1.0, 2.0)).ratio == 2.0
    assert Paired((2.0,), (1.0,)).each(1000) == (2.0, 1.0)


def device(*arguments: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.device", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_measured_daemon_loses_nothing_and_swaps(net: Subject, tmp_path: Path) -> None:
    frames = tmp_path / "frames.npz"
    np.savez(frames, images=photographs(20, 32, 4))
    *told, figures = device("time", str(net.path), str(frames), '{"pairs": 2, "frames": 40, "swaps": 5}')
    assert told[-1] == {"done": 7, "of": 7}
    assert figures["frames_lost"] == 0 and figures["predictions"] == figures["frames"] > 240
    assert figures["swaps"] == 5 and figures["metrics"]["swaps"] >= 5
    assert len(figures["ratios"]) == 2 and figures["integer_layers"] == figures["expected_integer_layers"] == 4
    assert figures["images_measured"] == 64 and figures["frames_while_measuring"] > 0 and figures["measurement_s"] > 0
    for what in ("daemon", "measured"):
        (memory,) = device("memory", str(net.path), str(frames), f'{{"what": "{what}", "frames": 40}}')
        assert 20 < memory["resident_mb"] < 2000


def test_the_measured_process_has_no_torch() -> None:
    code = "import sys, bench.device; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_overhead_reports_a_failed_process_in_a_sentence(net: Subject, tmp_path: Path) -> None:
    from refold.errors import RefoldError

    with pytest.raises(RefoldError, match="ended early"):
        overhead._child("time", net, tmp_path / "absent.npz", {"pairs": 1, "frames": 1, "swaps": 0}, None)


def test_claims_of_overhead(tmp_path: Path) -> None:
    row = {"net": "resnet50", "side": 224, "ratio": 1.025, "p99 ratio": 1.2, "frames lost": 0, "swaps": 50, "ratio min": 1.0,
           "ratio max": 1.05, "p99 steady ms": 2.0, "p50 steady ms": 1.0, "p99 swapping ms": 2.4,
           "images measured": 64, "p99 measuring ratio": 1.3}  # fmt: skip
    found = {c.id: c for c in overhead.claims([row])}
    assert all(c.holds for c in found.values()) and found["overhead.resnet50.ratio"].reaches_goal is False
    assert not overhead.claims([row | {"ratio": 1.031}])[0].holds
    assert not overhead.claims([row | {"p99 measuring ratio": 1.6}])[2].holds
    assert not overhead.claims([row | {"frames lost": 1}])[3].holds
    assert "overhead.mobilenetv2.ratio" not in {c.id for c in overhead.claims([row | {"net": "mobilenetv2"}])}
    overhead.plot(overhead.Result("overhead", [row], [], []), tmp_path / "o.png")
    assert (tmp_path / "o.png").stat().st_size > 5_000


def test_models_have_the_published_shapes() -> None:
    mobile, residual = MobileNetV2(), ResNet50()
    assert sum(p.numel() for p in mobile.parameters()) == 3_504_872
    assert sum(p.numel() for p in residual.parameters()) == 25_557_032
    assert [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (mobile, residual)] == [52, 53]


def test_a_sane_net_tells_pictures_apart() -> None:
    net = sane(Small(), 0)  # type: ignore[arg-type]
    x = (torch.from_numpy(photographs(12, 32, 5).transpose(0, 3, 1, 2).copy()).float() / 255 - 0.45) / 0.226
    with torch.no_grad():
        logits = net(x)
    assert logits.isfinite().all() and logits.std(0).mean() > 0.3 * logits.std()
    assert not net.training and all(m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_photographs_and_crops() -> None:
    made = photographs(3, 64, seed=2)
    assert made.shape == (3, 64, 64, 3) and made.dtype == np.uint8 and np.array_equal(made, photographs(3, 64, seed=2))
    assert np.abs(np.diff(made.astype(int), axis=2)).mean() < made.std()  # smooth, as photographs are
    real = crops(224, 5, 0)
    assert real.shape == (5, 224, 224, 3) and real.dtype == np.uint8 and not math.isclose(real[0].mean(), real[1].mean())


def test_targets_measures_both_runtimes(net: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small net through everything but the child process: rows, identity, claims, picture."""
    targets = pytest.importorskip("bench.targets")
    pictures = Pictures(photographs(24, 32), None)
    options = Options(targets.TARGETS, "small", min_agreement=0.0)
    exported = export_model(net.module, tmp_path / "m.refold", net.bundle.preprocess, pictures, options)
    both = Subject("resnet20", net.net, net.module, exported)
    monkeypatch.setattr(targets, "subject", lambda name, folder, targets, threads: both)
    frames = photographs(40, 32, seed=5)
    monkeypatch.setattr(targets, "_frames", lambda net, count: (frames, np.arange(40) % 6))
    monkeypatch.setattr(Subject, "frames", lambda self, count, seed=0: frames[:count])
    rows = targets.measured("resnet20", True, 0)
    assert [r["target"] for r in rows] == list(targets.TARGETS) and all(r["identical"] == r["states"] == 3 for r in rows)
    assert all(r["ms"] > 0 and r["peak MB"] > 0 and r["integer layers"] == 4 for r in rows)
    spoilt = [rows[0] | {"identical": 2, "same class": 99.0, "accuracy": 10.0, "float": 90.0}, rows[1]]
    beside = [
        {"net": n, "target": "litert", "accuracy": a, "model B": b} for n, a, b in (("theirs", 87.0, 100), ("ours", 86.9, 106))
    ]
    failed = {c.id for c in targets.claims([*spoilt, *beside]) if not c.holds}
    assert failed >= {
        "targets.resnet20.ort-x86-avx2.accuracy", "targets.resnet20.ort-x86-avx2.identical", "targets.resnet20.same",
        "targets.mlperf.accuracy", "targets.mlperf.size",
    }  # fmt: skip
    assert "targets.resnet20.litert.identical" not in failed
    result = Result("targets", rows, targets.claims(rows), ["net"])
    targets.plot(result, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1000
