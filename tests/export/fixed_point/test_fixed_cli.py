"""`fixed-point` as a person runs it: output, files, a kill in the middle, and one sentence for each failure."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from fixed_point_nets import labelled

from edge.engine import EngineFactory
from edge.serving import ServingState
from export.capture import load_model
from export.checks import perturbed
from export.fixed_point.cli import fixed_point_train
from refold.bundle import Bundle
from refold.errors import InputError, ModelError, RefoldError, StorageError, UsageError

HERE = Path(__file__).parent
MODEL = f"{HERE.parent / 'export_nets.py'}:residual"
PREPROCESS = "16x16,scale=1/255,mean=0.5/0.45/0.4,std=0.25/0.25/0.3"
FAST = ("--batch", "8", "--accumulation", "2", "--set", "lookback=2,6", "--set", "refresh=2")
PROGRAM = "from export.fixed_point.cli import fixed_point_train as f; f()"


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "train.npz"
    images, labels = labelled(96, 1)
    np.savez(path, images=images, labels=labels)
    return path


def arguments(npz: Path, out: Path, *more: str) -> list[str]:
    return [MODEL, "--data", str(npz), "--preprocess", PREPROCESS, "-o", str(out), *FAST, *more]


def run(npz: Path, out: Path, *more: str) -> object:
    done = CliRunner().invoke(fixed_point_train, arguments(npz, out, *more), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def weights(out: Path) -> dict[str, bytes]:
    with np.load(out / "trained.npz") as held:
        return {k: held[k].tobytes() for k in held.files}


def told(out: Path) -> dict[str, object]:
    """The report without what a clock measured."""
    found = json.loads((out / "report.json").read_text())
    found.pop("output")
    return {**found, "measured": {k: v for k, v in found["measured"].items() if k in ("accuracy", "integer_layers", "target")}}


def test_everything_a_person_sees(npz, tmp_path):
    done = run(npz, tmp_path / "o", "--epochs", "2")
    assert "epoch 2 of 2" in done.stderr and "7 integer layers" in done.stdout and "modelled, not measured" in done.stdout
    assert "stem.0.weight" in done.stdout and "unweighted, as published" in done.stdout
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["checkpoint.pt", "report.json", "trained.npz", "training.png"]
    assert (tmp_path / "o" / "training.png").read_bytes().startswith(b"\x89PNG")
    load_model(MODEL, tmp_path / "o" / "trained.npz")  # fits --weights
    found = told(tmp_path / "o")
    assert found["measured"]["integer_layers"] == 7 and found["average_word"] <= 8 and len(found["layers"]) == 7
    assert set(found["power_of_two"]["sites"]) >= {"stem.1", "head.fc"} and not found["power_of_two"]["used"]
    assert found["bytes"]["float32"] == 4 * found["bytes"]["delivered"]
    assert found["shortened"]  # the default target takes 7 bits, the default words have 8
    again = run(npz, tmp_path / "o", "--epochs", "2", "--json")
    assert "going on from step" in again.stderr and json.loads(again.stdout)["steps"] == found["steps"]


@pytest.mark.parametrize("more", [(), ("--power-of-two",)])
def test_a_bundle_of_what_was_trained(more, npz, tmp_path):
    """It passes every self-check, runs on the device's engine, and takes a release."""
    out = tmp_path / "m.refold"
    run(npz, tmp_path / "o", "--epochs", "1", "--bundle", str(out), *more)
    bundle = Bundle.open(out)
    runs_in = {layer.runs_in.partition(":")[0] for layer in bundle.manifest.layers if layer.op in ("conv", "linear")}
    assert "int8" in runs_in
    scales = bundle.norms.tensors(perturbed(bundle.norms, 0.05))
    folded = np.concatenate([np.ravel(v) for k, v in scales.items() if k.endswith(".weight_scale")])
    if more == ("--power-of-two",):
        assert (np.frexp(folded)[0] == 0.5).all()
    x = np.random.default_rng(0).normal(0, 1, (4, 3, 16, 16)).astype(np.float32)
    factory = EngineFactory(bundle)
    changed = factory.build(ServingState(perturbed(bundle.norms, 0.05))).run(x)
    assert np.isfinite(changed).all() and not np.array_equal(changed, factory.build(ServingState()).run(x))


def test_words_too_long_for_any_bundle_keep_the_training(npz, tmp_path):
    with pytest.raises(ModelError, match="can run in integers"):
        run(npz, tmp_path / "o", "--epochs", "1", "--published", "--bundle", str(tmp_path / "m.refold"))
    assert not (tmp_path / "m.refold").exists() and weights(tmp_path / "o")


def test_a_kill_changes_nothing(npz, tmp_path):
    run(npz, tmp_path / "whole", "--epochs", "3")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, *arguments(npz, out, "--epochs", "3", "--checkpoint-every", "0")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE.parents[2])
    try:
        deadline = time.monotonic() + 200
        while not (out / "checkpoint.pt").is_file():
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (out / "trained.npz").exists()
    done = run(npz, out, "--epochs", "3")
    assert "going on from step" in done.stderr
    assert weights(out) == weights(tmp_path / "whole") and told(out) == told(tmp_path / "whole")


def test_the_papers_words_and_the_baseline(npz, tmp_path):
    run(npz, tmp_path / "p", "--epochs", "1", "--published", "--json")
    found = told(tmp_path / "p")
    assert found["measured"]["integer_layers"] == 0 and found["average_word"] >= 12
    done = run(npz, tmp_path / "f", "--epochs", "1", "--float32")
    assert "float32" in done.stdout and json.loads((tmp_path / "f" / "report.json").read_text())["average_word"] == 32


def test_it_is_one_line_in_a_group(npz, tmp_path):
    group = click.Group("train", commands=[fixed_point_train])
    done = CliRunner().invoke(group, ["fixed-point", "--help"])
    assert done.exit_code == 0 and "Train MODEL" in done.output


@pytest.mark.parametrize(("more", "error", "says"), [
    (["--preprocess", "banana"], UsageError, "neither a size"), (["--weights", "none.npz"], InputError, "no weights file"),
    (["--data", "nowhere"], InputError, "no calibration set"), (["--set", "colour=1"], UsageError, "there are epochs"),
    (["--set", "l1=blue"], UsageError, "not a number"), (["--lr", "7"], UsageError, "learning_rate"),
    (["--lr", "1", "--epochs", "1", "--set", "unit_gradients=false", "--set", "momentum=0.999"], None, ""),
])  # fmt: skip
def test_failures_are_one_sentence(more, error, says, npz, tmp_path):
    if error is None:  # a training that may diverge says so or ends; it never leaves a traceback or half a file
        try:
            run(npz, tmp_path / "o", *more, "--float32")
        except ModelError as e:
            assert "Lower the learning rate" in e.message and not (tmp_path / "o" / "trained.npz").exists()
        return
    with pytest.raises(error, match=says):
        run(npz, tmp_path / "o", *more)
    assert not (tmp_path / "o" / "trained.npz").exists()


def test_pictures_without_labels_and_a_file_in_the_way(npz, tmp_path):
    np.savez(tmp_path / "bare.npz", images=labelled(8, 0)[0])
    with pytest.raises(InputError, match="no labels"):
        run(tmp_path / "bare.npz", tmp_path / "o")
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, RefoldError, AssertionError)):
        run(npz, tmp_path / "file" / "o")
