"""The script that CI runs the tests with: a server for one command, or a clear failure, never a silent skip."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "REFOLD_TEST_POSTGRES"}
    script = str(ROOT / "scripts" / "with-postgres")
    return subprocess.run([script, *arguments], env={**kept, **environment}, capture_output=True, text=True, check=False)


def test_a_server_that_is_named_is_used() -> None:
    done = run("sh", "-c", "echo $REFOLD_TEST_POSTGRES; exit 7", REFOLD_TEST_POSTGRES="postgresql+psycopg://a/b")
    assert (done.returncode, done.stdout) == (7, "postgresql+psycopg://a/b\n")


def test_without_a_server_the_command_does_not_run() -> None:
    done = run("touch", "/nowhere/at/all", REFOLD_POSTGRES_BIN="/nowhere")
    assert done.returncode == 69 and "apt-get install postgresql" in done.stderr and not done.stdout


def test_nothing_to_run_is_a_usage_error() -> None:
    assert run().returncode == 2 and "scripts/with-postgres make test" in run("--help").stdout


def test_ci_installs_the_server() -> None:
    assert "scripts/with-postgres --install make test" in (ROOT / ".ci" / "run").read_text()
