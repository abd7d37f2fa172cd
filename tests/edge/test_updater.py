"""The updater: after anything at all, the device runs exactly the old release or exactly the new one, and says which."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tiny_bundle import COHORT, bundle, release

import edge.updater as module
from edge.updater import CRASHES, STEPS, TRANSITIONS, Result, Updater, UpdateState
from refold import Bundle, SigningKey
from refold.errors import GateError, ReleaseError, SignatureError, StorageError
from refold.release import digest, seal
from refold.signing import KeyRing
from refold.v1.adaptation_pb2 import PollReleaseResponse

KEY = SigningKey.generate()
PROCESS = Path(__file__).with_name("updater_process.py")


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing catches it."""


class Device:
    """A folder and what its engine runs; `open` is a start of the daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bundle = bundle(folder / "m.refold")
        (folder / "key").write_bytes(KEY.public)
        self.running: int | None = None
        self.applied: list[int] = []
        self.fails: set[int] = set()
        self.error: BaseException = GateError("The canary's answers changed.")
        self.stop_at = ""
        self.now = 1_000_000
        self.updater: Updater | None = None

    def apply(self, r):
        version = r.version if r else 0
        if version in self.fails:
            raise self.error
        self.running = version
        self.applied.append(version)

    def at(self, step):
        if step == self.stop_at:
            self.stop_at = ""
            raise Killed

    def open(self, start=True, **kwargs) -> Updater:
        if self.updater is not None:
            self.updater.close()
        ring = KeyRing([KEY.public])
        self.running = None
        self.updater = Updater(
            self.folder / "state", self.bundle, ring, self.apply, cohort=COHORT, now_ms=lambda: self.now, at=self.at, **kwargs
        )
        if start:
            self.updater.start()
        return self.updater

    def signed(self, version, **changes):
        return seal(release(self.bundle, version, **changes), KEY)

    def order(self, version, **changes):
        assert self.updater is not None
        return self.updater.follow(PollReleaseResponse(release=self.signed(version, **changes)))

    def files(self):
        return sorted(p.name for p in self.folder.glob("state/*/releases/*"))


@pytest.fixture
def device(tmp_path):
    d = Device(tmp_path)
    d.open()
    yield d
    d.updater.close()


def test_a_new_device_runs_as_exported(device):
    assert device.updater.current is None and device.updater.version == 0 == device.running
    assert device.updater.state is UpdateState.IDLE


def test_three_updates_in_one_process_life(device):
    for version in (1, 2, 3):
        outcome = device.order(version)
        assert outcome.result is Result.INSTALLED and outcome.settled and outcome.version == version == device.running
    assert device.files() == sorted(digest(device.signed(v).payload) + ".release" for v in (2, 3))
    assert device.open().version == 3 == device.running


def test_the_same_release_again_is_no_work(device):
    device.order(1)
    assert device.order(1).result is Result.NOTHING and device.applied == [0, 1]


def test_an_empty_answer_changes_nothing(device):
    device.order(1)
    assert device.updater.follow(PollReleaseResponse()).result is Result.NOTHING
    assert device.updater.follow(PollReleaseResponse(next_in_ms=5)).version == 1


def test_the_cloud_orders_a_rollback(device):
    device.order(1)
    device.order(2)
    assert device.order(1).result is Result.INSTALLED and device.running == 1
    assert device.open().version == 1


def test_the_cloud_orders_the_exported_state_and_then_a_release(device):
    device.order(1)
    outcome = device.updater.follow(PollReleaseResponse(use_exported=True))
    assert outcome.result is Result.EXPORTED and outcome.settled and device.running == 0
    assert device.updater.follow(PollReleaseResponse(use_exported=True)).result is Result.NOTHING
    assert device.open().version == 0 and device.order(1).result is Result.INSTALLED


def test_a_replayed_old_release_is_refused_and_the_newer_stays(device):
    device.order(1)
    device.order(2)
    with pytest.raises(ReleaseError) as e:
        device.updater.offer(device.signed(1))
    assert e.value.code == "replayed" and device.running == 2 == device.updater.version


def test_a_newer_release_from_a_file_is_installed(device):
    assert device.updater.offer(device.signed(4)).version == 4 == device.running


def test_a_failing_release_is_remembered_and_not_tried_again(device):
    device.order(1)
    device.fails = {2}
    outcome = device.order(2)
    assert outcome.result is Result.REFUSED and "canary" in outcome.error.message and outcome.version == 1 == device.running
    assert outcome.refused == 2 == device.order(2).refused
    device.fails = set()
    before = list(device.applied)
    assert device.order(2).error.code == "failed-before" and device.applied == before
    device.open()
    assert device.order(2).error.code == "failed-before" and device.order(3).result is Result.INSTALLED
    device.updater.forgive(2)
    assert device.order(2).result is Result.INSTALLED


def test_any_error_of_the_canary_refuses_without_applying(device):
    tried = []

    def canary(r):
        tried.append(r.version)
        raise ZeroDivisionError("a fault in the engine")

    device.open(canary=canary)
    outcome = device.order(1)
    assert outcome.result is Result.REFUSED and "ZeroDivisionError" in outcome.error.message
    assert tried == [1] and device.running == 0 and device.files() == []


@pytest.mark.parametrize("error", [StorageError("The disk is full."), MemoryError()])
def test_an_error_that_may_pass_is_not_held_against_the_release(device, error):
    device.fails, device.error = {1}, error
    for _ in range(CRASHES + 1):
        outcome = device.order(1)
        assert outcome.result is Result.FAILED and not outcome.settled and device.running == 0
    device.fails = set()
    assert device.order(1).result is Result.INSTALLED


def test_a_forged_refusal_cannot_block_a_real_release(device):
    """Bytes nobody trusted signed leave no memory behind, whatever version they claim."""
    forged = seal(release(device.bundle, 1), SigningKey.generate())
    with pytest.raises(SignatureError):
        device.updater.offer(forged)
    assert device.updater.memory().versions == {} and device.files() == []
    assert device.order(1).result is Result.INSTALLED


def test_a_forged_release_that_claims_the_highest_version_raises_no_floor(device):
    with pytest.raises(SignatureError):
        device.updater.offer(seal(release(device.bundle, 2**63 - 1), SigningKey.generate()))
    assert device.updater.offer(device.signed(1)).version == 1


def test_a_release_for_another_bundle_is_refused(device):
    forged = seal(release(device.bundle, 7), SigningKey.generate())
    outcome = device.updater.follow(PollReleaseResponse(release=forged))
    assert outcome.error.code == "unsigned" and outcome.refused == 0
    assert device.order(1, bundle_digest="e" * 64).error.code == "wrong-bundle"
    assert device.order(1, cohort="cellar").error.code == "wrong-cohort"
    assert device.order(1, expires_unix_ms=5).error.code == "expired"
    assert device.running == 0 and device.files() == []


def test_a_release_that_expires_in_service_stays_in_service(device):
    device.order(1, expires_unix_ms=device.now + 10)
    device.now += 1000
    assert device.open().version == 1 == device.running


def test_revert_returns_to_the_release_before(device):
    device.order(1)
    device.order(2)
    assert device.updater.revert("accuracy fell").version == 1 == device.running
    assert device.order(2).error.code == "failed-before" and "accuracy fell" in device.order(2).error.message
    assert device.updater.revert("this one too") is None and device.running == 0
    assert device.updater.revert("nothing left") is None
    assert device.open().version == 0


def test_revert_skips_a_release_before_that_no_longer_serves(device):
    device.order(1)
    device.order(2)
    device.fails = {1}
    assert device.updater.revert("bad") is None and device.running == 0


def test_a_release_that_cannot_start_gives_way_to_the_one_before(device):
    device.order(1)
    device.order(2)
    device.fails = {2}
    assert device.open().version == 1 == device.running
    assert device.order(2).error.code == "failed-before"
    device.fails = {1}
    assert device.open().version == 0 == device.running


def test_a_bundle_that_cannot_run_at_all_says_so(device):
    device.order(1)
    device.fails = {0, 1}
    with pytest.raises(GateError):
        device.open()


def test_a_release_under_which_the_process_dies_at_start_is_given_up(device):
    device.order(1)
    device.order(2)
    device.fails, device.error = {2}, Killed()
    for _ in range(CRASHES):
        with pytest.raises(Killed):
            device.open()
    assert device.open().version == 1 and device.order(2).error.code == "failed-before"


def test_a_release_that_kills_its_installation_again_and_again_is_given_up(device):
    device.order(1)
    device.fails, device.error = {2}, Killed()
    for _ in range(CRASHES):
        with pytest.raises(Killed):
            device.order(2)
        assert device.open().version == 1
    assert device.order(2).error.code == "failed-before"


def test_a_healthy_start_clears_the_count(device):
    device.order(1)
    for _ in range(3 * CRASHES):
        device.stop_at = ""
        device.fails, device.error = {1}, Killed()
        with pytest.raises(Killed):
            device.open()
        device.fails = set()
        assert device.open().version == 1


def test_a_damaged_release_file_gives_way_and_may_come_again(device):
    device.order(1)
    device.order(2)
    name = digest(device.signed(2).payload) + ".release"
    path = next(device.folder.glob(f"state/*/releases/{name}"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert device.open().version == 1 == device.running
    assert device.order(2).result is Result.INSTALLED


def test_a_withdrawn_key_takes_its_releases_out_of_service(device):
    device.order(1)
    device.updater.close()
    updater = Updater(
        device.folder / "state", device.bundle, KeyRing([SigningKey.generate().public]), device.apply, cohort=COHORT
    )
    assert updater.start() is None and device.running == 0
    updater.close()


def test_a_damaged_state_file_falls_back_and_keeps_the_floor(device):
    device.order(3)
    device.updater.close()
    path = next(device.folder.glob("state/*/updates.sqlite"))
    path.write_bytes(b"not a database at all" * 400)
    updater = device.open()
    assert updater.version == 0 == device.running
    with pytest.raises(ReleaseError, match="not newer"):
        updater.offer(device.signed(2))
    assert device.order(3).result is Result.INSTALLED


def test_damage_found_while_running_is_survived_and_the_floor_kept(device):
    device.order(3)
    path = next(device.folder.glob("state/*/updates.sqlite"))
    device.updater._database.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * (path.stat().st_size - 4096))
    outcomes = [device.order(4).result for _ in range(2)]
    assert Result.INSTALLED in outcomes or device.running == 3
    updater = device.open()
    assert updater.version == device.running
    with pytest.raises(ReleaseError, match="not newer"):
        updater.offer(device.signed(2))


def test_each_bundle_cohort_and_fleet_has_its_own_memory(device, tmp_path):
    device.order(5)
    (tmp_path / "other").mkdir()
    other = bundle(tmp_path / "other" / "m.refold", name="other")
    for b, cohort, name in ((other, COHORT, b""), (device.bundle, "cellar", b""), (device.bundle, COHORT, b"another fleet")):
        updater = Updater(device.folder / "state", b, KeyRing([KEY.public]), device.apply, cohort=cohort, fleet=name)
        assert updater.start() is None
        updater.close()
    assert device.open().version == 5


def test_a_swap_that_cannot_be_recorded_is_taken_back(device):
    device.order(1)
    real = device.updater._commit
    device.updater._commit = lambda *a, **k: (_ for _ in ()).throw(StorageError("The disk is full."))
    for _ in range(CRASHES + 1):
        assert device.order(2).result is Result.FAILED and device.running == 1 == device.updater.version
    assert device.updater.follow(PollReleaseResponse(use_exported=True)).result is Result.FAILED and device.running == 1
    device.updater._commit = real
    assert device.order(2).result is Result.INSTALLED


def test_orders_from_two_threads_are_done_one_after_the_other(device):
    threads = [threading.Thread(target=device.order, args=(v,)) for v in (1, 2, 3, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert device.running == device.updater.version and device.open().version in (1, 2, 3, 4)


def test_the_journal_tells_what_happened_and_stays_small(device, monkeypatch):
    monkeypatch.setattr(module, "JOURNAL_ROWS", 10)
    device.order(1)
    device.fails = {2}
    device.order(2)
    assert [what for _, what, _, _ in device.updater.journal()] == ["current", "refused"]
    for i in range(12):
        device.order(1 if i % 2 else 3)
    assert len(device.updater.journal()) == 10


def test_the_transition_table_leads_everywhere_and_back():
    assert set(TRANSITIONS) == set(UpdateState)
    for state, following in TRANSITIONS.items():
        assert state is UpdateState.IDLE or UpdateState.IDLE in following
        assert state not in following


# ── a real process, a real SIGKILL, at every step of every flow ─────────────────────────────────────────────────────────────


FLOWS = {"upgrade": (1, 2), "rollback": (2, 1), "exported": (1, 0), "revert": (1, 0)}
PARTS = {"exported": ("applied", "committed", "pruned"), "revert": ("committed", "pruned")}
CASES = [(flow, step) for flow in FLOWS for step in PARTS.get(flow, STEPS)]


def prepared(folder: Path, flow: str) -> Device:
    device = Device(folder)
    device.open()
    if flow == "rollback":
        device.order(1)
    device.order(FLOWS[flow][0])
    device.updater.close()
    device.updater = None
    for name, version in (("upgrade", 2), ("rollback", 1)):
        (folder / name).write_bytes(device.signed(version).SerializeToString())
    return device


def run(folder: Path, flow: str, step: str, nth: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROCESS), str(folder), flow, step, str(nth)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("flow", "step"), CASES)
def test_a_kill_at_any_step_leaves_exactly_the_old_or_exactly_the_new(tmp_path, flow, step):
    old, new = FLOWS[flow]
    device = prepared(tmp_path, flow)
    nth = 1
    done = run(tmp_path, flow, step, nth)
    assert done.returncode == -signal.SIGKILL, done.stderr
    updater = device.open()
    committed = step in ("committed", "pruned")
    assert updater.version == (new if committed else old) == device.running
    assert updater.state is UpdateState.IDLE and not list(tmp_path.rglob("*.tmp"))
    if flow in ("upgrade", "rollback"):
        assert device.order(new).settled and device.running == new
    updater.close()


def test_a_log_cut_anywhere_by_a_power_failure_leaves_the_old_or_the_new(device, tmp_path):
    """The state file's log ends where the disk stopped writing; the release files were synced before it named them."""
    device.order(1)
    device.order(2)
    state = next(device.folder.glob("state/*/updates.sqlite"))
    log = Path(f"{state}-wal")
    kept = {f: f.read_bytes() for f in state.parent.rglob("*") if f.is_file() and not f.name.endswith("-shm")}
    device.updater.close()
    seen = set()
    for end in [*range(0, len(kept[log]), max(len(kept[log]) // 50, 1)), len(kept[log])]:
        shutil.rmtree(state.parent)
        for f, content in kept.items():
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_bytes(content[:end] if f == log else content)
        device.updater = None
        updater = device.open()
        assert updater.version == device.running and updater.state is UpdateState.IDLE
        seen.add(updater.version)
        assert device.order(2).settled and device.running == 2
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("where", ["in-canary", "in-apply"])
def test_a_kill_inside_the_engine_leaves_the_old(tmp_path, where):
    device = prepared(tmp_path, "upgrade")
    for _ in range(CRASHES):
        assert run(tmp_path, "upgrade", where).returncode == -signal.SIGKILL
    updater = device.open()
    assert updater.version == 1 == device.running
    assert device.order(2).error.code == "failed-before"
    updater.close()


@pytest.mark.parametrize("step", ["disk-full", "disk-full-commit"])
@pytest.mark.parametrize("flow", ["upgrade", "rollback", "exported"])
def test_a_full_disk_keeps_the_old_release_running_and_recorded(tmp_path, flow, step):
    """The kernel refuses every write of the process (RLIMIT_FSIZE); afterwards the same order succeeds."""
    old, new = FLOWS[flow]
    device = prepared(tmp_path, flow)
    done = run(tmp_path, flow, step)
    assert done.stdout.split() == ["failed", str(StorageError.exit_code), str(old), str(old)], done.stderr
    updater = device.open()
    assert updater.version == old == device.running
    if new:
        assert device.order(new).result is Result.INSTALLED
    updater.close()


class UpdaterMachine(RuleBasedStateMachine):
    """Orders, offers, failures, reverts, restarts and deaths in any order."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.device = Device(self.folder)
        self.device.open()
        self.refused: set[int] = set()
        self.deaths: Counter[int] = Counter()
        self.highest = 0

    def installed(self, version):
        self.highest = max(self.highest, version)
        self.deaths[version] = 0

    @rule(version=st.integers(1, 6), step=st.sampled_from(["", "", *STEPS]))
    def order(self, version, step):
        old = self.device.running
        self.device.stop_at = step
        try:
            outcome = self.device.order(version)
            expected = old if version in self.refused else version
            assert outcome.version == expected == self.device.running
        except Killed:
            now = self.device.open().version
            assert now == (version if step in ("committed", "pruned") else old)
            self.deaths[version] += step not in ("verified", "written", "committed", "pruned")
            if self.deaths[version] == CRASHES:
                self.refused.add(version)
        self.device.stop_at = ""
        self.installed(self.device.running)

    @rule(version=st.integers(1, 6))
    def offer(self, version):
        old = self.device.running
        wanted = version not in self.refused and (version > self.highest or version == old)
        if wanted:
            assert self.device.updater.offer(self.device.signed(version)).version == version
            self.installed(version)
        else:
            with pytest.raises(ReleaseError):
                self.device.updater.offer(self.device.signed(version))
            assert self.device.running == old

    @rule(version=st.integers(1, 6))
    def fail(self, version):
        old = self.device.running
        self.device.fails = {version} - {old}
        outcome = self.device.order(version)
        if version != old:
            assert not outcome.settled and self.device.running == old
            self.refused.add(version)
        self.device.fails = set()

    @rule()
    def revert(self):
        if self.device.running:
            self.refused.add(self.device.running)
        self.device.updater.revert("machine")
        assert self.device.running not in self.refused or self.device.running == 0

    @rule()
    def exported(self):
        self.device.updater.follow(PollReleaseResponse(use_exported=True))
        assert self.device.running == 0

    @rule()
    def restart(self):
        old = self.device.running
        assert self.device.open().version == old

    @invariant()
    def what_runs_is_what_is_recorded(self):
        if hasattr(self, "device"):
            updater = self.device.updater
            assert updater.version == self.device.running and updater.state is UpdateState.IDLE
            memory = updater.memory()
            assert memory.highest_version == self.highest and set(memory.refused) == {
                digest(self.device.signed(v).payload) for v in self.refused
            }
            assert self.device.running not in self.refused or not self.device.running

    def teardown(self):
        if hasattr(self, "device"):
            self.device.updater.close()
            shutil.rmtree(self.folder)


UpdaterMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestUpdaterMachine = UpdaterMachine.TestCase


def test_the_bundle_is_read_from_its_file(tmp_path):
    assert Bundle.open(bundle(tmp_path / "m.refold").path).norms.norms[0].name == "conv"
