"""What the elastic benchmark claims of its rows, its picture, and that nothing it reports on was learned from."""

from __future__ import annotations

from pathlib import Path

from bench.elastic import claims, plot
from bench.elastic.setting import FULL, QUICK, Pictures, Scale
from bench.result import Options, Result
from export.elastic.data import Labelled

ROWS: list[dict[str, str | float | None]] = [
    {"configuration": "float", "accuracy %": 91.7},
    {"configuration": "w8a8", "accuracy %": 91.5, "alone %": 91.6, "ORT static %": 91.4, "kB": 280.0},
    {"configuration": "w4a4", "accuracy %": 90.0, "alone %": 91.5, "kB": 150.0},
    {"configuration": "searched w4a4", "accuracy %": 90.4, "kB": 149.0, "equal to": "w4a4"},
]


def test_claims_compare_with_nets_alone_uniform_ones_and_onnx_runtime() -> None:
    found = {c.id: c for c in claims(ROWS, {"spearman": 0.93, "pearson": 0.7})}
    assert found["elastic.spearman"].holds and not found["elastic.pearson"].holds
    assert found["elastic.w8a8.alone"].holds and not found["elastic.w4a4.alone"].holds
    assert found["elastic.searched w4a4"].holds and round(found["elastic.searched w4a4"].value, 6) == 0.4
    assert found["elastic.w8a8.ort"].holds


def test_the_picture_is_written(tmp_path: Path) -> None:
    plot(Result("elastic", ROWS, [], [], {"steps": 8}, True), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_are_kept_apart_and_steps_are_a_flag() -> None:
    import numpy as np

    assert Scale.of(Options()).training.steps == FULL and Scale.of(Options(quick=True)).training.steps == QUICK
    pictures = Pictures(Scale.of(Options(steps=77)))
    assert pictures.scale.training.steps == 77
    pictures.__dict__["data"] = Labelled(np.zeros(15_000, np.int64), lambda index: np.zeros((len(index), 32, 32, 3), np.uint8))
    learned, searched, reported = pictures.searching.train, pictures.searching.held, pictures.reporting.held
    assert not set(learned) & set(searched) and not set(searched) & set(reported) and not set(learned) & set(reported)
    assert len(learned) == 5000 and len(searched) == 2000 and len(reported) == 8000
