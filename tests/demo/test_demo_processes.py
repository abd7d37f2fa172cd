"""Nothing outlives the demo: real processes, real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.processes import Processes, free_port, refold_command
from refold.errors import RefoldError, StorageError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
]


def _gone(pid: int) -> bool:
    """Ended, whether or not somebody has collected its status yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def _wait(condition, seconds: float = 20.0) -> bool:
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.02)
    return bool(condition())


def test_leaving_ends_everything_even_what_is_deaf_or_stopped(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        ordinary, deaf, stopped = (processes.start(n, c) for n, c in (("a", SLEEP), ("b", DEAF), ("c", SLEEP)))
        assert _wait(lambda: deaf.tail() == "deaf")
        stopped.signal(signal.SIGSTOP)
        deaf.stop(patience=0.2)
    assert all(_gone(p.pid) for p in (ordinary, deaf, stopped))
    assert deaf.exit == -signal.SIGKILL and ordinary.exit == -signal.SIGTERM
    life = ordinary.life(processes.origin)
    assert life.name == "a" and life.seconds > 0 and life.exit == -signal.SIGTERM


def test_an_error_inside_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Processes(tmp_path) as processes:
        process = processes.start("a", SLEEP)
        raise KeyboardInterrupt
    assert _gone(process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's PR_SET_PDEATHSIG")
def test_kill_minus_nine_of_the_demo_takes_its_processes_along(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from demo.processes import Processes; p = Processes(pathlib.Path(sys.argv[1]))\n"
        "child = p.start('child', [sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)'])\n"
        "while not child.tail(): time.sleep(.02)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not _gone(child)
        parent.kill()
    assert _wait(lambda: _gone(child))


def test_run_gives_the_output_and_names_a_failure(tmp_path: Path) -> None:
    ticks: list[int] = []
    with Processes(tmp_path) as processes:
        said = processes.run("hello", [sys.executable, "-c", "print('hi')"], 30, lambda: ticks.append(1))
        assert said == "hi\n" and ticks
        with pytest.raises(RefoldError, match=r"fails failed \(exit 7\): the reason"):
            processes.run("fails", [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(7)"], 30)
        with pytest.raises(RefoldError, match="longer than"):
            processes.run("slow", SLEEP, 0.3)
        with pytest.raises(RefoldError, match=r"(?s)inspect failed \(exit [0-9]+\): .*no-such"):
            processes.run("inspect", refold_command("inspect", "no-such.refold"), 60)


def test_a_process_that_ends_by_itself_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start("edge", [sys.executable, "-c", "print('out of luck'); raise SystemExit(3)"])
        assert _wait(lambda: process.exit is not None)
        with pytest.raises(RefoldError, match=r"edge process ended by itself \(exit 3\): out of luck"):
            process.must_run()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be started"):
        Processes(tmp_path / "missing").start("a", SLEEP)


def test_free_ports_are_free() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", free_port()))


def test_children_of_a_process_end_with_it(tmp_path: Path) -> None:
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with Processes(tmp_path) as processes:
        process = processes.start("a", [sys.executable, "-c", script])
        assert _wait(lambda: process.tail().isdigit())
        grandchild = int(process.tail())
        assert not _gone(grandchild)
    assert _wait(lambda: _gone(grandchild))


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_held_process_stands_still_and_goes_on(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start("a", [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"])
        assert _wait(lambda: process.tail() == "1")
        hold = processes.hold(process)
        assert _wait(lambda: _state(process.pid) == "T")
        hold.release()
        hold.release()
        assert _wait(lambda: _state(process.pid) != "T")
        processes.hold(process)
        assert _wait(lambda: _state(process.pid) == "T")
    assert process.exit == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's PR_SET_PDEATHSIG")
def test_kill_minus_nine_while_a_process_is_held(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from demo.processes import Processes; p = Processes(pathlib.Path(sys.argv[1]))\n"
        "child = p.start('child', [sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)'])\n"
        "while not child.tail(): time.sleep(.02)\n"
        "p.hold(child); print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _wait(lambda: _state(child) == "T")
        parent.kill()
    assert _wait(lambda: _gone(child))
