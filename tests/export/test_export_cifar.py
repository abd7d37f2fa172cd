"""Trained CIFAR-10 networks: int8 keeps the float accuracy on pictures calibration never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo.images import load_u8
from export.capture import load_model
from export.engines import infer, session
from export.pictures import Pictures
from export.pipeline import export_model
from export.preprocessing import parse_preprocess

ROOT = Path(__file__).parents[2]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "weights", "preprocess", "layers", "norms", "least"),
    [
        pytest.param("resnet20", "resnet20_cifar10", "32x32,imagenet", 20, 19, 0.905, marks=pytest.mark.slow),
        ("resnet8", "resnet8_mlperftiny_cifar10", "32x32,pixels", 10, 7, 0.85),
    ],
)
def test_a_trained_network(name, weights, preprocess, layers, norms, least, data_folder, tmp_path):
    plan = parse_preprocess(preprocess)
    train = load_u8(data_folder / "cifar10_train5k.u8.xz")[::40]
    model = load_model(f"{ROOT / 'demo/models.py'}:{name}", data_folder / f"{weights}.npz")
    done = export_model(model, tmp_path / "m.refold", plan, Pictures(train, None))
    checks = done.checks["ort-x86-avx2"]
    assert checks["integer_layers"] == layers and len(done.bundle.norms.norms) == norms
    assert checks["student_argmax"] >= 0.995 and checks["student_within_two_steps"] >= 0.99

    test = load_u8(data_folder / "cifar10_test.u8.xz")[:1000]
    labels = np.load(data_folder / "cifar10_test_labels.npy")[:1000]
    engine = session(done.bundle.read(done.bundle.target().model), done.bundle.norms.tensors())
    assert float((infer(engine, plan.apply(test), 50).argmax(1) == labels).mean()) >= least
