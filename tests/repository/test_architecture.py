"""The rules between folders: arrows point one way, devices never import torch, generated code is fresh."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "refold": set(),
    "export": {"refold"},
    "edge": {"refold"},
    "cloud": {"refold"},
    "demo": {"refold", "edge", "export", "cloud"},
}
PAGING = ROOT / "edge" / "experts"  # behind the `moe` extra: language models are transformers' own code
GATE = {"cloud/gate.py"}  # runs the very engine the device runs
OURS = {"refold", "export", "edge", "cloud", "demo", "bench", "tests", "examples"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        allowed = ALLOWED[package] | {package} | ({"edge"} if name in GATE else set())
        assert not (imports(path) & OURS) - allowed, name


@pytest.mark.parametrize("package", ["refold", "edge"])
def test_a_device_never_imports_torch(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        if PAGING in path.parents:
            continue
        assert not imports(path) & {"torch", "onnx", "scipy", "sklearn"}, path


def test_importing_every_edge_module_leaves_torch_out():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "edge").rglob("*.py")
        if p.name != "__init__.py" and PAGING not in p.parents
    ]
    program = f"""
import importlib, sys
for name in {["edge", *modules]!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as e:
        assert e.name == "cv2", e
heavy = [m for m in ("torch", "onnx", "scipy", "sqlalchemy") if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_generated_code_is_fresh():
    pytest.importorskip("grpc_tools")
    done = subprocess.run(
        [ROOT / "scripts/gen-protos", "--check"], env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_error_has_a_documented_exit_code():
    import refold.errors as errors

    for name in errors.__all__:
        kind = getattr(errors, name)
        assert kind.exit_code == 1 or f"exit {kind.exit_code}" in (errors.__doc__ or ""), name
        assert kind("x", code="c").code == "c" and kind("x").message == "x"


def test_no_large_files_are_committed():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.decode().split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 10 * 2**20, name
