"""The command line as a person meets it: real processes, real exit codes, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from samples import PARTS, bundle

from refold import SigningKey
from refold.cli import main


def refold(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "refold.cli", *map(str, args)], capture_output=True, text=True, check=False)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(a) for a in args])
    except SystemExit as e:
        code = int(e.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("export", "inspect", "extract", "verify", "edge", "cloud", "demo"):
        assert name in out
    assert run(capsys, "--version")[1].startswith("refold, version")


def test_inspect_prints_layers_bits_bytes_sites_and_targets(tmp_path, capsys):
    bundle(tmp_path / "m.refold")
    code, out, _ = run(capsys, "inspect", tmp_path / "m.refold")
    assert code == 0
    for word in ("conv", "layer1.0.conv1", "7", "108", "ort-x86-avx2", "student.pt2", "int8", "fused"):
        assert word in out
    code, out, _ = run(capsys, "inspect", tmp_path / "m.refold", "--json")
    described = json.loads(out)
    assert described["layers"][0]["bits"] == 7 and described["targets"][0]["checks"] == {"fused": 1}


def test_extract_and_verify(tmp_path, capsys):
    key = SigningKey.generate()
    bundle(tmp_path / "m.refold", key)
    code, out, _ = run(capsys, "extract", tmp_path / "m.refold")
    assert code == 0 and (tmp_path / "m" / "student.pt2").read_bytes() == PARTS["student.pt2"] and "student.pt2" in out
    code, out, _ = run(capsys, "verify", tmp_path / "m.refold", "--key", key.public.hex())
    assert code == 0 and "signature good" in out
    code, _, err = run(capsys, "verify", tmp_path / "m.refold", "--key", SigningKey.generate().public.hex())
    assert code == 6 and "nobody this device trusts" in err
    assert run(capsys, "verify", tmp_path / "m.refold", "--key", "xyz")[0] == 2


@pytest.mark.parametrize("content", [None, b"", b"not a zip at all"])
def test_a_bad_bundle_is_one_sentence_and_exit_code_5(tmp_path, content):
    if content is not None:
        (tmp_path / "m.refold").write_bytes(content)
    done = refold("inspect", tmp_path / "m.refold")
    assert done.returncode == 5 and done.stdout == ""
    assert done.stderr.startswith("refold: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_json_errors_are_json(tmp_path):
    done = refold("inspect", tmp_path / "none.refold", "--json")
    assert done.returncode == 5 and json.loads(done.stdout)["error"]["code"] == "no-bundle"


def test_unknown_commands_and_options_are_usage_errors(tmp_path, capsys):
    assert run(capsys, "inspekt")[0] == 2
    assert run(capsys, "inspect", "--nope")[0] == 2


def test_debug_shows_the_traceback(tmp_path):
    done = refold("--debug", "inspect", tmp_path / "none.refold")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_missing_extra_is_named(monkeypatch, capsys):
    import refold.cli as cli

    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    code, _, err = run(capsys, "export", "x")
    assert code == 1 and "pip install 'refold[export]'" in err


def test_ctrl_c_is_130(monkeypatch, capsys, tmp_path):
    import refold.inspection as inspection

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection.Bundle, "open", interrupted)
    assert run(capsys, "inspect", tmp_path)[0] == 130
