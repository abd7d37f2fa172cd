"""The lines of docs/guide/your-own-model.md run as they stand; what they write runs on both runtimes and takes a release."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edge.engine import EngineFactory
from edge.serving import ServingState
from export.checks import perturbed
from refold.bundle import Bundle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "your-own-model.md"


def test_the_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ai_edge_litert")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    working = [line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(working) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {})
    bundle = Bundle.open("mine.refold")
    assert bundle.digest in capsys.readouterr().out and [t.updatable for t in bundle.manifest.targets] == [True] * 3
    x = np.random.default_rng(1).normal(0, 1, (3, 3, 32, 32)).astype(np.float32)
    states = perturbed(bundle.norms, 0.1)
    for target in ("ort-x86-avx2", "litert"):
        factory = EngineFactory(bundle, target)
        before, after = factory.build(ServingState()).run(x), factory.build(ServingState(states)).run(x)
        assert np.isfinite(after).all() and not np.array_equal(before, after)
