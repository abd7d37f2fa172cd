"""`refold demo` as a command: refusals before anything is started, and the whole loop on digits (slow)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REFOLD = [sys.executable, "-m", "refold.cli", "demo"]


def _demo(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environment}
    return subprocess.run([*REFOLD, *arguments], capture_output=True, text=True, timeout=timeout, env=environ, check=False)


def test_a_work_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    done = _demo("--work", str(tmp_path), "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and "not the demo's" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_an_output_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = _demo("--output", str(tmp_path / "file" / "out"), "--work", str(tmp_path / "work"))
    assert done.returncode == 7 and "cannot be made" in done.stderr and "Traceback" not in done.stderr


def test_too_few_frames_are_refused(tmp_path: Path) -> None:
    done = _demo("--frames", "3", "--output", str(tmp_path), "--work", str(tmp_path / "work"))
    assert done.returncode == 2 and "at least 400" in done.stderr


def _processes_under(folder: Path) -> list[str]:
    """Command lines that name the folder: whatever a demo in it started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_loop_on_digits(tmp_path: Path) -> None:
    arguments = [
        "--digits",
        "--frames",
        "4400",
        "--no-live",
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out"),
    ]
    done = _demo(*arguments, timeout=560)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 10), done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["frames"] == 4400 and report["frames_lost"] == 0 and report["images"] == "digits"
    assert report["releases"] and all(len(r["digest"]) == 64 for r in report["releases"])
    assert report["shifted"]["gain"] > 0 and report["traffic"]["samples"] > 0 and report["traffic"]["bytes_up"] > 0
    assert {p["name"] for p in report["processes"]} == {"cloud", "device"}
    assert report["holds"] is (done.returncode == 0)
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert not _processes_under(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_interrupting_it_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = [
        "--digits",
        "--frames",
        "1600",
        "--no-live",
        "--work",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen([*REFOLD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        predictions = tmp_path / "work" / "predictions.jsonl"
        give_up = time.monotonic() + 200
        while not (predictions.exists() and predictions.stat().st_size) and time.monotonic() < give_up:
            assert demo.poll() is None, demo.stderr.read() if demo.stderr else ""
            time.sleep(0.1)
        demo.send_signal(signal.SIGINT)
        _, said = demo.communicate(timeout=60)
    assert demo.returncode == 130 and "Traceback" not in said, said
    assert not _processes_under(tmp_path)
