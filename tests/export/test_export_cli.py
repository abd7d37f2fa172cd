"""`refold export` as a person runs it: output, exit codes, one sentence for each failure, nothing left behind."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import export_nets
import numpy as np
import onnx
import pytest
from small_disk import SmallDisk

from refold.bundle import Bundle
from refold.cli import main
from refold.signing import KeyRing, SigningKey

MODEL = f"{Path(__file__).parent / 'export_nets.py'}:residual"
PREPROCESS = "16x16,scale=1/255,mean=0.5/0.45/0.4,std=0.25/0.25/0.3"


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(["export", *args])
        raise SystemExit(0)
    return int(e.value.code or 0)


def test_a_signed_bundle_with_everything(tmp_path, npz, capsys):
    key = SigningKey.generate()
    key.save(tmp_path / "key.pem")
    out = tmp_path / "m.refold"
    assert run(MODEL, "--calibration", str(npz), "--preprocess", PREPROCESS, "-o", str(out), "--key", str(tmp_path / "key.pem"),
               "--classes", "a,b,c,d,e", "--name", "small", "--sample-limit", "24") == 0  # fmt: skip
    told = capsys.readouterr()
    assert "7 integer layers of 7 bits" in told.out and "every check passed" in told.out and "calibrating" in told.err
    bundle = Bundle.open(out)
    bundle.verify(KeyRing([key.public]))
    assert bundle.manifest.name == "small" and list(bundle.manifest.classes) == list("abcde")
    with np.load(bundle.extract(tmp_path / "x") / "calibration.npz") as held:
        assert held["images"].shape == (24, 16, 16, 3)
    for name in ("model", "taps"):
        onnx.load(tmp_path / f"x/targets/ort-x86-avx2/{name}.onnx", load_external_data=False)
    main(["inspect", str(out)])
    shown = capsys.readouterr().out
    assert "depthwise" not in shown and "6 norm sites" in shown and "perturbed_identical" in shown


def test_json_and_skipped_pictures(tmp_path, capsys):
    from PIL import Image

    for i, picture in enumerate(export_nets.pictures(24)):
        Image.fromarray(picture).save(tmp_path / f"{i:02}.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    args = (MODEL, "--calibration", str(tmp_path), "--preprocess", "imagenet", "--input-size", "16x16", "-o",
            str(tmp_path / "m.refold"), "--classes", str(tmp_path / "names.txt"))  # fmt: skip
    assert run(*args, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["skipped"] == ["small.png is 9x9, not 16x16: the model takes exactly 16x16."] and told["pictures"] == 24
    assert told["integer_layers"] == 7 and told["checks"]["ort-x86-avx2"]["exported_identical"] == 1.0
    assert run(*args) == 0
    assert "1 pictures were skipped: small.png is 9x9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--preprocess", "banana"], 2, "neither a size"),
        (["--weights", "none.npz"], 3, "no weights file"),
        (["--calibration", "nowhere"], 3, "no calibration set"),
        (["--key", "none.pem"], 2, "signing key"),
        (["--target", "tpu"], 2, "tpu"),
        (["--classes", "a,b"], 2, "names 2 classes"),
        (["--min-agreement", "1", "--observer", "minmax", "--keep-float", "zzz"], 2, "fits no layer"),
    ],
)
def test_failures_are_one_sentence(args, code, says, tmp_path, npz, capsys):
    base = ["--calibration", str(npz), "--preprocess", PREPROCESS, "-o", str(tmp_path / "m.refold")]
    assert run(MODEL, *base, *args) == code
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told
    assert not (tmp_path / "m.refold").exists()


def test_a_full_disk_loses_nothing(tmp_path):
    rng = np.random.default_rng(0)
    noisy = np.clip(export_nets.pictures(256) + rng.integers(0, 9, (256, 16, 16, 3)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "c.npz", images=noisy)
    out = tmp_path / "m.refold"
    out.write_bytes(b"the earlier bundle")

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    done = subprocess.run(
        [sys.executable, "-m", "refold.cli", "export", MODEL, "--calibration", str(tmp_path / "c.npz"),
         "--preprocess", PREPROCESS, "-o", str(out), "--observer", "minmax"],
        capture_output=True, text=True, preexec_fn=small_disk, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert out.read_bytes() == b"the earlier bundle" and not list(tmp_path.glob(".m.refold*"))


@pytest.mark.parametrize(
    ("state", "code", "sentence"),
    [
        ("read-only", 7, "Read-only file system"),
        ("full", 7, "No space left on device"),
        ("directory", 2, "is a directory"),
        ("missing", 2, "There is no directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path, capsys, state, code, sentence):
    """The pictures do not exist: who looks at the output first never finds out."""
    with SmallDisk(tmp_path / "disk") as disk:
        out = disk.root / "m.refold"
        if state == "read-only":
            disk.read_only(True)
        elif state == "full":
            disk.fill()
        elif state == "directory":
            out.mkdir()
        else:
            out = disk.root / "none" / "m.refold"
        assert run(MODEL, "--calibration", "nowhere", "--preprocess", PREPROCESS, "-o", str(out)) == code
        said = capsys.readouterr().err.strip().splitlines()
        assert (len(said) == 1 and sentence in said[0] and str(out) in said[0]) or str(out.parent) in said[0]
