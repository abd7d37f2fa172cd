"""How the native kernel comes about: cache, missing and broken compilers, two processes at once, files of somebody else."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge.experts import kernel
from edge.experts.kernel import build
from edge.experts.kernel.native import Native
from edge.experts.kernel.portable import PORTABLE
from refold.errors import UsageError

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
ROOT = Path(build.__file__).parents[3]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))  # sooner compiled
    return tmp_path / "cache" / "refold" / "kernels"


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "compiler"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_it_is_built_once_and_kept(own_cache: Path) -> None:
    first = build.library()
    made = first.stat()
    assert first.parent == own_cache and build.library() == first
    assert first.stat().st_mtime_ns == made.st_mtime_ns and [p.name for p in own_cache.iterdir()] == [first.name]
    assert not made.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@needs_compiler
def test_another_compiler_or_source_is_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = build.library()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    second = build.library()
    sources = tmp_path / "sources"
    shutil.copytree(build.HERE, sources)
    (sources / "expert.c").write_text((build.HERE / "expert.c").read_text() + "\n/* changed */\n")
    monkeypatch.setattr(build, "HERE", sources)
    assert len({first, second, build.library()}) == 3


@needs_compiler
def test_processes_that_build_at_once_all_get_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "fresh")}
    told = "from edge.experts.kernel import build; print(build.library())"
    running = [
        subprocess.Popen([sys.executable, "-c", told], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running) and len(paths) == 1
    assert [str(p) for p in (tmp_path / "fresh" / "refold" / "kernels").iterdir()] == list(paths)


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernel.choose("") is PORTABLE
    with pytest.raises(UsageError, match="no C compiler"):
        kernel.choose("native")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo cc 1; [ $1 = --version ] || { echo 'expert.c: internal error' >&2; exit 4; }", "internal error"),
        ("exit 1", "says nothing"),
        # A compiler that makes something that is no library, and one that makes none.
        ('echo cc 1; while [ $# -gt 0 ]; do [ "$1" = -o ] && echo junk > "$2"; shift; done', "does not load"),
        ("echo cc 1", "cannot be written"),
    ],
)
def test_a_broken_compiler_is_told_and_torch_does_it(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", script(tmp_path, text))
    assert kernel.choose("") is PORTABLE
    with pytest.raises(UsageError, match=said):
        kernel.choose("native")


@needs_compiler
def test_a_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(build.HERE, sources)
    code = (sources / "expert.c").read_text()
    assert "a->bits == 4 ? 8 :" in code
    (sources / "expert.c").write_text(code.replace("a->bits == 4 ? 8 :", "a->bits == 4 ? 7 :"))
    monkeypatch.setattr(build, "HERE", sources)
    with pytest.raises(build.UnavailableError, match="something else at 4 bits"):
        Native()


@needs_compiler
def test_what_others_may_write_is_not_loaded(own_cache: Path) -> None:
    library = build.library()
    library.write_bytes(b"not ours")
    library.chmod(0o777)
    assert build.library() == library and library.read_bytes()[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    own_cache.chmod(0o777)
    with pytest.raises(build.UnavailableError, match="others may write"):
        build.library()


def test_without_a_folder_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kernel.choose("") is PORTABLE


def test_torch_can_be_forced_and_nonsense_is_refused() -> None:
    assert kernel.choose("torch") is PORTABLE
    with pytest.raises(UsageError, match="REFOLD_KERNEL"):
        kernel.choose("fast")


def test_its_sources_are_part_of_the_package() -> None:
    included = (ROOT / "pyproject.toml").read_text()
    assert '"*.c"' in included and '"*.h"' in included and all((build.HERE / s).is_file() for s in build.SOURCES)


@needs_compiler
@pytest.mark.parametrize("forced", ["native", "torch"])
def test_the_environment_chooses_and_name_says_which(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_in_use", None)
    monkeypatch.setenv("REFOLD_KERNEL", forced)
    assert kernel.name.startswith(forced) and kernel.name == kernel.kernel().name
