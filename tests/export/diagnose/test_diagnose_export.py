"""Doubts and held-out accuracy as a person meets them: printed, in JSON, in the bundle, in `inspect`; `--strict` refuses."""

from __future__ import annotations

import json
from pathlib import Path

import export_nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import export.checks as checks
from export.diagnose.held_out import HeldOut, measured_accuracy, told_accuracy
from export.pictures import Pictures, load_pictures
from export.pipeline import Options, export_model, make_recipe
from refold.bundle import Bundle
from refold.cli import main
from refold.errors import GateError, InputError
from refold.inspection import inspect
from refold.preprocess import Preprocess

NETS = Path(__file__).parents[1] / "export_nets.py"
PREPROCESS = "16x16,scale=1/255,mean=0.5/0.45/0.4,std=0.25/0.25/0.3"
FAST = ("--observer", "minmax")


def _answers(images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = export_nets.make("residual")(torch.from_numpy(export_nets.PREPROCESS.apply(images)))
    found: np.ndarray = logits.numpy().argmax(1)
    return found


def _labelled(images: np.ndarray, wrong: int) -> np.ndarray:
    labels = _answers(images)
    labels[:wrong] = (labels[:wrong] + 1) % export_nets.CLASSES
    return labels


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """train: 40 labelled images, all right; unseen: 60 others, 6 wrong, and two of train's; free: unlabelled."""
    folder = tmp_path_factory.mktemp("sets")
    train, unseen = export_nets.pictures(40, seed=1), export_nets.pictures(60, seed=2)
    np.savez(folder / "train.npz", images=train, labels=_labelled(train, 0))
    both = np.concatenate([unseen, train[:2]])
    np.savez(folder / "unseen.npz", images=both, labels=np.concatenate([_labelled(unseen, 6), _answers(train[:2])]))
    np.savez(folder / "free.npz", images=unseen)
    np.savez(folder / "three.npz", images=train[:3])
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        main(["export", *args])
        raise SystemExit(0)
    told = capsys.readouterr()
    return int(e.value.code or 0), told.out, told.err


def test_accuracy_is_of_unseen_images_and_says_so(sets, tmp_path, capsys):
    base = (f"{NETS}:residual", "--calibration", str(sets / "train.npz"), "--preprocess", PREPROCESS, *FAST)
    code, out, err = run(capsys, *base, "--validation", str(sets / "unseen.npz"), "-o", str(tmp_path / "m.refold"))
    assert code == 0, err
    assert "measured on 60 validation images" in out and "90.0% in float" in out
    assert "2 of 62 validation images are calibration images as well; they were left out. [validation-overlap]" in err
    target = Bundle.open(tmp_path / "m.refold").target()
    assert target.checks["validation_images"] == 60 and target.checks["validation_accuracy_float"] == pytest.approx(0.9)
    assert Bundle.open(tmp_path / "m.refold").manifest.findings[0].code == "validation-overlap"
    shown = CliRunner().invoke(inspect, [str(tmp_path / "m.refold")]).output
    assert "validation_accuracy_int8" in shown and "on images given as unseen (--validation)" in shown
    assert "warning of the export: 2 of 62" in shown
    told = json.loads(CliRunner().invoke(inspect, [str(tmp_path / "m.refold"), "--json"]).output)
    assert told["targets"][0]["accuracy_measured_on"] == "validation" and told["warnings"][0]["numbers"]["left_out"] == 2

    code, out, err = run(capsys, *base, "-o", str(tmp_path / "n.refold"), "--json")
    accuracy = json.loads(out)["accuracy"]["ort-x86-avx2"]
    assert code == 0 and accuracy["images"] == 40 and "may be training images" in accuracy["measured_on"]
    with_them, without = (Bundle.open(tmp_path / f"{n}.refold") for n in "mn")
    assert [(p.path, p.sha256) for p in with_them.parts if p.path != "student.pt2"] == [
        (p.path, p.sha256) for p in without.parts if p.path != "student.pt2"
    ], "validation adds figures to the manifest and nothing else"  # the student's zip carries its own time
    assert not any(k.startswith("validation") for k in without.target().checks) and not without.manifest.findings
    shown = CliRunner().invoke(inspect, [str(tmp_path / "n.refold")]).output
    assert "on the calibration images, which may be training images" in shown


def test_a_model_that_was_never_loaded_three_images_and_strict(sets, tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        f"import sys\nsys.path.insert(0, {str(NETS.parent)!r})\nfrom export_nets import Residual\n\n"
        "def fresh():\n    return Residual().eval()\n"
    )
    base = (f"{tmp_path / 'net.py'}:fresh", "--preprocess", PREPROCESS, "--min-agreement", "0", *FAST)
    out_file = str(tmp_path / "m.refold")
    code, out, err = run(capsys, *base, "--calibration", str(sets / "train.npz"), "-o", out_file)
    assert code == 0 and "warnings below" in out and "which may be training images" in out
    assert "[untrained]" in err and "--weights forgotten" in err and "[chance]" in err
    assert out.index("every check passed, 2 warnings below") < len(out)
    Path(out_file).unlink()
    code, out, err = run(capsys, *base, "--calibration", str(sets / "three.npz"), "-o", out_file, "--strict")
    assert code == 10 and "only 3 different calibration images" in err and "because of --strict" in err
    assert not Path(out_file).exists() and "Traceback" not in err


def test_folders_that_are_not_the_models_classes(tmp_path, capsys):
    for i, picture in enumerate(export_nets.pictures(36)):
        place = tmp_path / "set" / f"class{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{i:02}.png")
    base = (f"{NETS}:residual", "--calibration", str(tmp_path / "set"), "--preprocess", PREPROCESS, *FAST)
    code, out, err = run(capsys, *base, "-o", str(tmp_path / "m.refold"))
    assert code == 0 and "3 class folders and the model has 5 classes" in err and "accuracy not measured" in out
    with np.load(Bundle.open(tmp_path / "m.refold").extract(tmp_path / "x") / "calibration.npz") as held:
        assert "labels" not in held, "labels that mean nothing do not reach the cloud"
    Image.fromarray(export_nets.pictures(1)[0]).save(tmp_path / "set" / "stray.png")
    found = load_pictures(tmp_path / "set", Preprocess(16, 16))
    assert found.labels is None and "1 of 37 lie in no sub-folder" in found.notes[0]


def test_labels_of_the_wrong_form_are_named(tmp_path):
    images = export_nets.pictures(4)
    for labels, says in ((np.zeros(3, np.int64), "(3,)"), (np.eye(4), "(4, 4)"), (np.full(4, 0.5), "float64")):
        np.savez(tmp_path / "a.npz", images=images, labels=labels)
        found = load_pictures(tmp_path / "a.npz", Preprocess(16, 16))
        assert found.labels is None and says in found.notes[0]
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(4.0))
    assert list(load_pictures(tmp_path / "a.npz", Preprocess(16, 16)).labels) == [0, 1, 2, 3]
    with pytest.raises(InputError, match="no validation set"):
        load_pictures(tmp_path / "nowhere", Preprocess(16, 16), what="validation")


def test_held_out_images(sets):
    train, unseen, free = (load_pictures(sets / f"{n}.npz", export_nets.PREPROCESS) for n in ("train", "unseen", "free"))
    recipe = make_recipe(export_nets.make("residual"), export_nets.PREPROCESS, train, Options(observer="minmax"))
    with pytest.raises(InputError, match="All 40 validation images are calibration images"):
        HeldOut(recipe.truth, train, train, export_nets.PREPROCESS, 5)
    bare = HeldOut(recipe.truth, free, train, export_nets.PREPROCESS, 5)
    numbers, logits = bare.measure("t", lambda x: bare.float_logits[: len(x)], 0.9)
    assert [f.code for f in bare.findings] == ["validation-unlabelled"] and len(logits) == 60
    assert numbers == {"validation_images": 60.0, "validation_argmax_float": 1.0}
    assert "validation images have no labels" in told_accuracy(numbers, 40) and measured_accuracy(numbers, 40) is None
    held = HeldOut(recipe.truth, unseen, train, export_nets.PREPROCESS, 5)
    with pytest.raises(GateError, match="of the 60 validation images"):
        held.measure("t", lambda x: -held.float_logits, 0.9)
    rng = np.random.default_rng(0)
    nonsense = Pictures(free.images, rng.integers(0, 5, 60))
    assert [f.code for f in HeldOut(recipe.truth, nonsense, train, export_nets.PREPROCESS, 5).findings] == ["chance"]


@pytest.mark.parametrize(("same", "count", "refused"), [(63, 64, False), (62, 64, False), (60, 64, True), (980, 1000, True)])
def test_two_runtimes_are_judged_by_an_interval(same, count, refused):
    theirs = np.eye(4, dtype=np.float32)[np.arange(count) % 4]
    logits = theirs.copy()
    logits[same:] = np.roll(logits[same:], 1, 1)
    if refused:
        with pytest.raises(GateError, match=r"--accept-difference") as e:
            checks.agree("litert", logits, "ort", theirs, 0.01)
        assert e.value.code == "targets-differ"
    found = checks.agree("litert", logits, "ort", theirs, 0.01, accepted=True)
    assert found == {"argmax_ort": same / count, **({"difference_accepted": 1.0} if refused else {})}


def test_a_difference_is_accepted_and_told(tmp_path, monkeypatch):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr(checks, "_same_class", lambda logits, theirs, step: 0.5)
    pictures = Pictures(export_nets.pictures(40), None)
    export = (export_nets.make("residual"), tmp_path / "m.refold", export_nets.PREPROCESS, pictures)
    options = Options(("ort-x86-avx2", "litert"), observer="minmax")
    with pytest.raises(GateError, match=r"only 50\.0% of 40 pictures"):
        export_model(*export, options)
    assert not (tmp_path / "m.refold").exists()
    done = export_model(*export, Options(("ort-x86-avx2", "litert"), observer="minmax", accept_difference=True))
    kept = done.bundle.manifest.findings[0]
    assert kept.code == "targets-differ" and "accepted by --accept-difference" in kept.message
    assert kept.numbers["images"] == 40 and done.checks["litert"]["difference_accepted"] == 1
