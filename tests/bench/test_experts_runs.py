"""Caps, the loop that times tokens, bounds and claims: what the experts benchmark computes from its runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.experts.cgroup import Caps, Finished, cap_bytes
from bench.experts.checkpoint import Words
from bench.experts.claims import ablation, claims, find, of_long_run
from bench.experts.disk import evict, rate, read_ahead
from bench.experts.job import TEXT, Job, Outcome, drive
from bench.experts.journal import Journal
from bench.experts.lines import ALLOWANCE, CAPS, LLAMA, LLAMA_RESIDENT, OURS, RESIDENT, Line, Plan, plan
from bench.experts.measure import Run, _outcome
from bench.experts.rows import rows
from bench.experts.shape import OLMOE, QUICK, Shape

TINY = Shape("tiny", layers=2, experts=8, top_k=2, hidden=256, intermediate=32, heads=2, tokens=64)
CAN_CAP = Caps.find()
needs_caps = pytest.mark.skipif(bool(CAN_CAP.reason), reason=f"no memory control group: {CAN_CAP.reason}")


def test_cap_arithmetic():
    assert cap_bytes(0.25, 1 << 20, 4096, 8192) == (1 << 18) + 4096 + 8192
    assert cap_bytes(0.5, 1001, 1, 0) == 4096, "whole pages"


def test_olmoe_is_of_the_size_that_the_protocol_asks_for():
    assert 3.5e9 < OLMOE.expert_bytes(4) < 4e9 and 6e9 < OLMOE.expert_bytes(8) < 8e9
    assert OLMOE.routed == 1024 and OLMOE.contents < OLMOE.hidden
    both = 2 * (OLMOE.expert_bytes(8) + OLMOE.resident_bytes)
    assert both < 20e9


@pytest.mark.parametrize(("shape", "quick"), [(OLMOE, False), (QUICK, True)])
def test_every_line_gets_room_for_one_layer(shape, quick):
    whole = plan(shape, quick)
    titles = [line.title for line in whole.lines]
    assert len(set(titles)) == len(titles)
    names = {(line.name, line.share) for line in whole.lines}
    assert {(OURS, c) for c in CAPS} | {(LLAMA, c) for c in CAPS} | {(RESIDENT, None)} <= names
    for line in whole.lines:
        budget = line.budget(shape)
        if line.kind == "paged" and not line.options.get("mapped"):
            assert budget >= (shape.top_k + 1) * shape.record(line.bits)
        else:
            assert budget == 0
    fp32 = next(line for line in whole.lines if line.slots == "fp32" and line.share == 0.25)
    packed = next(line for line in whole.lines if line.name == OURS and line.share == 0.25)
    assert packed.budget(shape) / fp32.budget(shape) > (3 if quick else 6), "decoded experts take seven times the bytes"
    assert max(line.runs for line in whole.lines) == (1 if quick else 5)
    assert shape.name in ALLOWANCE


def _fill(megabytes):
    return [sys.executable, "-c", f"x = bytearray({megabytes} << 20); x[::4096] = b'1' * len(x[::4096]); print('filled')"]


@needs_caps
def test_a_group_kills_what_is_over_its_cap_and_goes_away():
    with CAN_CAP.group() as group:
        group.limit(48 << 20)
        over = group.run(_fill(96), os.environ, 60)
        path = group.path
        assert path.is_dir()
    assert over.killed >= 1 and over.code != 0 and "filled" not in over.output
    assert over.peak <= 48 << 20
    assert not path.exists()


@needs_caps
def test_a_group_measures_what_fits():
    with CAN_CAP.group() as group:
        group.limit(128 << 20)
        under = group.run(_fill(40), os.environ, 60)
    assert under.code == 0 and under.killed == 0 and under.output == "filled\n"
    assert 40 << 20 <= under.peak <= 128 << 20


@needs_caps
def test_a_group_ends_what_takes_too_long():
    with CAN_CAP.group() as group:
        late = group.run([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, 0.5)
    assert late.code != 0 and "ended after" in late.errors


def test_without_a_controller_the_reason_is_told(tmp_path):
    assert "no memory control group" in Caps.find(tmp_path).reason
    (tmp_path / "cgroup.procs").write_text("")
    (tmp_path / "cgroup.subtree_control").write_text("cpu pids")
    assert "does not give its children" in Caps.find(tmp_path).reason


def test_the_disk_is_measured_by_reading_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 << 20))
    evict(path)
    assert 1e5 < rate(path, 100_000, total=2 << 20) < 1e12


def test_the_loop_times_words_of_the_trace_and_counts_right_successors(tmp_path):
    asked = []

    def step(word):
        asked.append(word)
        logits = np.zeros(5, np.float32)
        logits[(word + 1) % 5 if word != 2 else 0] = 1
        return logits

    marks = []
    job = Job("x", "m", first=4, warm=2, tokens=5, logits=3, keep=str(tmp_path / "l.npy"))
    out = drive(job, step, 5, 1.5, lambda: marks.append(len(asked)))
    assert asked == [4, 0, 1, 2, 3, 4, 0], "the text begins again after its last word"
    assert marks == [2] and len(out.times) == 5 and out.right == 4 and out.load_seconds == 1.5
    assert np.load(tmp_path / "l.npy").argmax(1).tolist() == [0, 1, 2]
    assert Outcome.from_json(out.to_json()).times == out.times
    assert Job.from_json(job.to_json()) == job


def test_a_long_run_goes_on_and_watches_memory_at_the_same_place_of_every_text():
    out = drive(Job("x", "m", 0, 0, 1, seconds=0.3), lambda w: np.zeros(4, np.float32), 4, 0)
    _, anonymous, resident, files = out.memory[0]
    assert 1000 < anonymous < resident and files > 0
    assert len(out.memory) == len(out.times) // TEXT > 3
    seconds = np.cumsum(out.times)[TEXT - 1 :: TEXT]
    assert all(told >= sum_of_steps - 0.06 for (told, *_), sum_of_steps in zip(out.memory, seconds, strict=True))


def test_slopes_of_a_long_run():
    flat = [(i, 1000, 3000, 9) for i in range(100)]
    assert of_long_run(flat) == (0, 0, 0)
    leaking = [(i, 1000 + 2 * i, 3000 + 3 * i, 9 + (i > 90)) for i in range(100)]
    anonymous, resident, files = of_long_run(leaking)
    assert anonymous == pytest.approx(120) and resident == pytest.approx(180) and files == 1
    assert np.isnan(of_long_run([])[0])


PLAN = Plan((), warm=4, tokens=8)
STATUS = {"VmHWM": 1000, "VmRSS": 900, "RssAnon": 500, "RssFile": 400}
GOOD = Finished(0, "", "", peak=5_000_000, anonymous=4_000_000, killed=0)


def _run(line, seconds, read=0, hits=-1, slots=0, stall=-1.0, first=0, own=0):
    details = {"covered": 0, "wasted bytes": 0}
    out = Outcome([seconds] * 8, 8, read * 8, 1.0, STATUS, hits, 32 - hits if hits >= 0 else -1, stall, 0, slots, details)
    return Run(line, first, 6_000_000 if line.share else 0, 1e6, GOOD, out, read_ahead=128, own=own)


def test_rows_and_claims_from_runs():
    words = Words.of(TINY)
    ours = Line(OURS, "paged", 0.25, options={"ahead": 4})
    theirs = Line(LLAMA, "llama", 0.25)
    runs = [_run(Line(RESIDENT, "paged", None, slots="all"), 0.010)]
    budget = ours.budget(TINY)
    own = 1024 * STATUS["RssAnon"] - budget // 2
    runs += [
        _run(ours, t, read=10_000, hits=12, slots=9, stall=0.04, first=i, own=own - i * budget // 4)
        for i, t in enumerate((0.012, 0.015, 0.04))
    ]
    runs += [_run(theirs, 0.03, read=30_000)]
    found = rows(runs, words, PLAN)
    assert [r["engine"] for r in found] == [RESIDENT, OURS, LLAMA]
    row = find(found, OURS, 0.25)
    assert row["tokens/s"] == pytest.approx(1 / 0.015, rel=1e-3), "the median run"
    assert row["compute ms"] == 10 and row["reading ms"] == 10, "10 kB at 1 MB/s take as long as computing"
    assert row["time / compute"] == pytest.approx(1.5) and row["hit"] == 0.375
    assert row["promise"] == pytest.approx(1.0, abs=1e-3), "the worst run, not the median"
    assert 0 < float(row["belady"]) <= 1
    assert row["MB/token"] == 0.01 and row["peak MB"] == 5 and row["OOM"] == 0 and row["stall ms"] == 5
    assert find(found, LLAMA, 0.25)["reading ms"] == 30
    held = {c.id: c for c in claims(found)}
    assert held["experts.25.speed"].value == pytest.approx(2, rel=1e-3) and held["experts.25.speed"].holds
    assert held["experts.25.compute"].holds and held["experts.25.promise"].holds
    assert not any("12.5" in key for key in held), "nothing is claimed of caps that were not run"


def test_a_killed_run_holds_no_claim():
    dead = Run(
        Line(OURS, "paged", 0.25), 0, 6_000_000, 1e6, Finished(137, "", "", 6_000_000, 0, 1), None, "killed: out of memory"
    )
    found = rows([dead, _run(Line(LLAMA, "llama", 0.25), 0.03)], Words.of(TINY), PLAN)
    assert found[0]["note"] == "killed: out of memory" and found[0]["OOM"] == 1
    held = {c.id: c.holds for c in claims(found)}
    assert not held["experts.25.speed"] and not held["experts.25.oom"] and not held["experts.25.compute"]
    assert not held["experts.25.promise"]


def test_memory_over_what_was_given_is_told():
    """The kernel's cap is no evidence for the promise: what the process took beside its own is."""
    line = Line(OURS, "paged", 0.25, options={"ahead": 4})
    own = 1024 * STATUS["RssAnon"] - 2 * line.budget(TINY)
    found = rows([_run(line, 0.01, hits=12, slots=9, own=own)], Words.of(TINY), PLAN)
    claim = {c.id: c for c in claims(found)}["experts.25.promise"]
    assert claim.value == pytest.approx(2.0, abs=1e-3) and not claim.holds


def test_everything_in_memory_is_compared_with_the_best_of_llama_cpp():
    runs = [_run(Line(RESIDENT, "paged", None, slots="all"), 0.02), _run(Line(LLAMA_RESIDENT, "llama", None), 0.02)]
    runs += [_run(Line(f"{LLAMA_RESIDENT}, repacked", "llama", None), 0.01)]
    claim = {c.id: c for c in claims(rows(runs, Words.of(TINY), PLAN))}["experts.memory.speed"]
    assert claim.value == pytest.approx(0.5) and not claim.holds


def test_what_a_child_says_is_read():
    assert _outcome(Finished(0, "chatter\n" + _run(Line(OURS, "paged", 0.5), 0.1).outcome.to_json(), "", 0, 0, 0))[1] == ""
    assert _outcome(Finished(3, "", "Traceback\nThe disk failed.", 0, 0, 0)) == (None, "ended with 3: The disk failed.")
    assert _outcome(Finished(-9, "", "", 0, 0, 1)) == (None, "killed: out of memory")


def test_the_ablation_is_in_edgemoe_s_order():
    lines = [line for line in plan(TINY, False).lines if line.share == 0.25 and line.kind == "paged"]
    found = rows([_run(line, 0.1 * (i + 1), hits=1, slots=9) for i, line in enumerate(lines)], Words.of(TINY), PLAN)
    steps = [str(r["engine"]) for r in ablation(found)]
    assert steps[0].endswith("8 bits, on demand") and steps[-1].endswith("all") and len(steps) == 5


def test_guesses_are_wrong_as_often_as_said():
    from bench.experts.paged import Front

    told = []

    class Pager:
        def hint(self, layer, experts, confidence=None):
            told.append(experts)

    front = Front(Pager(), 64, recall=0.8)
    for _ in range(500):
        front.hint(0, list(range(8)))
    right = np.mean([e < 8 for experts in told for e in experts])
    assert right == pytest.approx(0.8, abs=0.03)
    assert all(len(set(experts)) == 8 for experts in told)


def test_a_mapped_bundle_gives_the_same_records(tmp_path):
    from bench.experts.checkpoint import write_bundle
    from bench.experts.paged import Mapped
    from refold.experts.paged import PagedModel

    write_bundle(tmp_path / "m.refold", Words.of(TINY), 4)
    model = PagedModel.open(Path(tmp_path / "m.refold"))
    experts, records = next(Mapped(model).waves(1, [3, 0]))
    assert experts == [3, 0]
    assert [r.tobytes() for r in records] == [model.read_record(1, 3), model.read_record(1, 0)]


def test_a_journal_gives_runs_back_and_forgets_a_line_that_was_cut_off(tmp_path):
    line = Line(OURS, "paged", 0.25, runs=2)
    whole = Plan((line,), 4, 8)
    path = tmp_path / "x.runs.jsonl"
    first = Journal(path, TINY, whole, "abc", resume=False)
    run = _run(line, 0.012, read=10_000, hits=12, slots=9, stall=0.04)
    first.note(run, 0)
    assert not first.has_all(whole.lines)
    with path.open("a") as f:
        f.write('{"title": "refold at 25')
    again = Journal(path, TINY, whole, "abc", resume=True)
    assert again.known(line, 1) is None
    back = again.known(line, 0)
    assert back is not None and back.outcome == run.outcome and back.finished == run.finished
    assert (back.rate, back.read_ahead) == (run.rate, 128)
    again.note(run, 1)
    assert Journal(path, TINY, whole, "abc", resume=True).has_all(whole.lines)
    for other in (Journal(path, TINY, whole, "another commit", resume=True), Journal(path, TINY, whole, "abc", resume=False)):
        assert other.known(line, 0) is None
    other.remove()
    assert not path.exists()


def test_the_kernel_reads_ahead_as_by_default_and_afterwards_as_before(tmp_path):
    number = tmp_path.stat().st_dev
    told = tmp_path / f"{os.major(number)}:{os.minor(number)}" / "read_ahead_kb"
    with read_ahead(tmp_path, devices=tmp_path) as held:
        assert held is None
    told.parent.mkdir()
    told.write_text("8192\n")
    with pytest.raises(ZeroDivisionError), read_ahead(tmp_path, devices=tmp_path) as held:
        assert held == 128 and told.read_text() == "128"
        raise ZeroDivisionError
    assert told.read_text() == "8192"
