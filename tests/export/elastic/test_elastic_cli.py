"""The commands, as a person runs them: train, search, export a configuration; failures in one sentence."""

from __future__ import annotations

import json

import elastic_nets
import numpy as np
import pytest
from elastic_nets import MODEL

from export.elastic.space import Configuration
from refold.bundle import Bundle
from refold.cli import main


def fails(capsys, *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as e:
        main(["export", *args])
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return int(e.value.code or 0), told


def test_a_finished_run_says_what_it_reached(finished):
    result = json.loads((finished.path / "result.json").read_text())
    names = [row["configuration"] for row in result["rows"]]
    assert names == ["float, before", *(f"w{b}a{b}" for b in range(8, 1, -1))]
    by_name = {row["configuration"]: row for row in result["rows"]}
    assert by_name["w8a8"]["accuracy"] > 0.6
    assert by_name["w2a2"]["bytes"] < by_name["w8a8"]["bytes"] < by_name["float, before"]["bytes"]
    assert (finished.path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_search_then_export_what_was_found(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("export.elastic.predictor.FEWEST_UPDATES", 100)
    run = str(finished.path)
    least = json.loads((finished.path / "result.json").read_text())["rows"][-1]["bytes"]
    main(["export", "search", run, "--budget", f"{least + 400}", "--pairs", "12", "--pictures", "40", "--generations", "5",
          "--population", "20", "--finalists", "2", "--name", "small", "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["best"]["bytes"] <= least + 400 and told["pairs"] == 12
    assert all(row["bytes"] <= least + 400 for row in told["finalists"] + told["uniform"])
    for name in ("search-small.png", "predictor-small.png"):
        if told["predictor"]["pairs"] >= 3 or name.startswith("search"):
            assert (finished.path / name).is_file()
    chosen = Configuration.from_json((finished.path / "configurations/small.json").read_text())
    assert chosen.weights[0][1].bits == chosen.weights[-1][1].bits == 8
    # Values of fewer than 8 bits are for the writers; weights of any width are delivered as they are.
    mixed = finished.settings().space.uniform(finished.supernet().layout, 3, 8)
    (tmp_path / "mixed.json").write_text(mixed.to_json())
    out = tmp_path / "m.refold"
    main(["export", "--from", run, "--configuration", str(tmp_path / "mixed.json"), "-o", str(out), "--sample-limit", "32",
          "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    checks = told["checks"]["ort-x86-avx2"]
    assert checks["argmax_float"] >= 0.9 and checks["exported_identical"] == checks["perturbed_identical"] == 1
    bundle = Bundle.open(out)
    assert bundle.digest == told["digest"] and len(bundle.norms.norms) == 5
    with np.load(bundle.extract(tmp_path / "x") / "calibration.npz") as held:
        assert held["images"].shape == (32, 16, 16, 3) and held["labels"].shape == (32,)


def test_failures_are_one_sentence(finished, files, tmp_path, capsys):
    run, (weights, pictures) = str(finished.path), files
    train = ["train", MODEL, "--weights", str(weights), "--preprocess", elastic_nets.PREPROCESS_TEXT, "--steps", "2"]
    out = ["-o", str(tmp_path / "x")]
    code, told = fails(capsys, "search", run, "--budget", "10B")
    assert code == 2 and "the least possible is" in told
    code, told = fails(capsys, "search", run)
    assert code == 2 and "at least one of --budget" in told
    code, told = fails(capsys, "search", str(tmp_path), "--budget", "1MB")
    assert code == 3 and "not the folder of an elastic training" in told
    code, told = fails(capsys, "--from", run, "--configuration", "nothing", *out)
    assert code == 2 and "no configuration 'nothing'" in told
    code, told = fails(capsys, "--from", run, "--configuration", "w4a4", *out, "--data", str(tmp_path / "gone"))
    assert code == 3 and "gone" in told
    code, told = fails(capsys, *train, "--data", str(pictures), "--elastic", "w1-8", *out)
    assert code == 2 and "from 2 to 8" in told
    images, labels = elastic_nets.digits()
    np.savez(tmp_path / "more.npz", images=images[:40], labels=labels[:40] + 1)
    code, told = fails(capsys, *train, "--data", str(tmp_path / "more.npz"), *out)
    assert code == 3 and "the model has 10 outputs" in told
    np.savez(tmp_path / "other.npz", images=images[:40], labels=labels[:40])
    code, told = fails(capsys, "--from", run, "--configuration", "w8a8", *out, "--data", str(tmp_path / "other.npz"))
    assert code == 3 and "not the pictures that the run was trained on" in told
    assert not (tmp_path / "x").exists()


def test_a_second_training_in_one_folder_is_refused(finished, files, capsys):
    weights, pictures = files
    with finished.held():
        code, told = fails(
            capsys, "train", MODEL, "--weights", str(weights), "--data", str(pictures), "--preprocess", "16x16", "--steps", "4",
            "-o", str(finished.path),
        )  # fmt: skip
    assert code == 2 and "Another process is training" in told


def test_the_plain_command_and_its_help_are_as_they_were(capsys):
    for args, says in (
        (["--help"], "refold export [OPTIONS] MODEL"),
        (["train", "--help"], "refold export train [OPTIONS] MODEL"),
        (["search", "--help"], "refold export search [OPTIONS] RUN"),
        (["--from", "x", "--help"], "--configuration"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["export", *args])
            raise SystemExit(0)
        assert not e.value.code and says in capsys.readouterr().out
    code, told = fails(capsys)
    assert code == 2 and "MODEL" in told
