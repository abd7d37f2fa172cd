"""Plans and replays: by hand on small numbers, and as commands on a bundle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from expert_files import BASE, make_index, write_model

from edge.experts.cache import memory_sizes
from edge.experts.plan import measure_disk, parse_rate, plan
from edge.experts.policies import ValueWeights, kept_weights
from edge.experts.replay import belady, compare, replay, tune
from edge.experts.trace import Trace, TraceWriter
from refold.cli import main
from refold.errors import InputError, StorageError, UsageError
from refold.experts import ExpertIndex, write_paged


def routing(tokens=60, layers=(0, 1, 2), experts=8, seed=0):
    """A favourite pair for some tokens, then another, with some noise."""
    rng = np.random.default_rng(seed)
    out = []
    for t in range(tokens):
        token = []
        for p in range(len(layers)):
            liked = [(t // 10 + p) % experts, (t // 10 + p + 3) % experts]
            token.append((p, np.array(sorted(liked if rng.random() < 0.8 else rng.choice(experts, 2, replace=False).tolist()))))
        out.append(token)
    return Trace(tuple(layers), experts, 2, out)


def same(a, b):
    assert (a.layers, a.experts, a.top_k, len(a)) == (b.layers, b.experts, b.top_k, len(b))
    for x, y in zip(a.tokens, b.tokens, strict=True):
        assert [(p, e.tolist()) for p, e in x] == [(p, e.tolist()) for p, e in y]


@pytest.mark.parametrize("name", ["t.npz", "t.jsonl"])
def test_a_trace_is_read_as_it_was_written(tmp_path, name):
    trace = routing()
    wide = Trace(trace.layers, 8, 2, [[(0, np.arange(8)), (2, np.array([3]))], [], *trace.tokens])
    wide.save(tmp_path / name)
    same(Trace.load(tmp_path / name), wide)
    Trace(trace.layers, 8, 2, []).save(tmp_path / name)
    assert len(Trace.load(tmp_path / name)) == 0


def test_a_trace_whose_writer_was_killed_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    routing(5).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    same(Trace.load(path), routing(5).part(0, 4))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.npz", b"no zip"),
        ("t.npz", b"PK\x03\x04 cut off"),
        ("t.jsonl", b"{}\n"),
        ("t.jsonl", b""),
        ("t.jsonl", b'{"layers":[0],"experts":2,"top_k":1}\n[[0,[5]]]\n'),
        ("t.jsonl", b'{"layers":[0],"experts":2,"top_k":1}\n[[3,[0]]]\n'),
    ],
)
def test_what_is_no_trace_is_said(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="no routing trace"):
        Trace.load(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        Trace.load(tmp_path / "gone.npz")
    with pytest.raises(UsageError, match=r"npz or a \.jsonl"):
        TraceWriter(tmp_path / "t.txt", (0,), 2, 1)


def test_a_replay_by_hand():
    """Two slots, one layer: 0 1 2 0 1. LRU misses all, Belady keeps 0."""
    trace = Trace((0,), 3, 1, [[(0, np.array([i]))] for i in (0, 1, 2, 0, 1)])
    sizes = np.full(3, 10, np.int64)
    assert replay(trace, sizes, 20, "lru").hits == 0
    best = belady(trace, sizes, 20)
    assert (best.asked, best.hits, best.bytes_read, best.hit_rate) == (5, 1, 40, 0.2)
    counted = belady(trace, sizes, 20, skip=3)
    assert (counted.tokens, counted.asked, counted.hits, counted.bytes_per_token) == (2, 2, 1, 5.0)


def test_a_union_larger_than_memory_is_replayed_in_pieces():
    trace = Trace((0,), 6, 1, [[(0, np.arange(6))], [(0, np.array([5]))]])
    told = replay(trace, np.full(6, 4, np.int64), 12, "lru")
    assert told.asked == 7 and told.hits == 1
    with pytest.raises(UsageError):
        replay(trace, np.full(6, 40, np.int64), 12, "lru")


def test_tuning_never_reads_more_on_what_it_was_tuned_on():
    trace, sizes = routing(80), np.full(24, 4096, np.int64)
    steps = []
    weights = tune(trace, sizes, 10 * 4096, rounds=1, step=lambda: steps.append(1))
    skip = len(trace) // 8
    before = replay(trace, sizes, 10 * 4096, "value", skip=skip)
    after = replay(trace, sizes, 10 * 4096, "value", weights=weights, skip=skip)
    assert after.bytes_read <= before.bytes_read and 10 < len(steps) <= 22
    assert set(compare(trace, sizes, 10 * 4096, policies=["lru"])) == {"lru", "belady"}


def test_a_plan_by_hand():
    """Frequencies .75 and .25 of 2 experts, top 1, 3 layers: a budget for half holds the likelier of each layer."""
    index, _ = make_index(experts=2, top_k=1)
    often = {(layer, e): (0.75, 0.25)[e] for layer in range(3) for e in range(2)}
    index = ExpertIndex(index.geometry, index.records, often)
    size = index.largest
    told = plan(index, 3 * size, 10.0 * size, compute=0.05)
    assert told.hit_rate == pytest.approx(0.75) and told.bytes_per_token == pytest.approx(0.75 * size)
    assert (told.floor, told.total, told.slots, told.cold_bytes) == (2 * size, 6 * size, 1.0, pytest.approx(3 * size))
    assert told.read_seconds == pytest.approx(0.075)
    assert told.fastest == pytest.approx(1 / 0.075) and told.slowest == pytest.approx(1 / 0.125)
    assert told.needed_hit_rate == pytest.approx(1 - 0.05 * 10 / 3)
    with pytest.raises(UsageError, match=f"{2 * size:,}"):
        plan(index, 2 * size - 1, 1e6)
    with pytest.raises(UsageError, match="above 0"):
        plan(index, 3 * size, 0)


def test_a_plan_from_a_trace_is_the_replay():
    index, _ = make_index()
    trace = routing()
    told = plan(index, index.total // 2, 1e8, trace=trace, policy="lru")
    found = replay(trace, memory_sizes(index), index.total // 2, "lru", skip=15)
    assert told.hit_rate == found.hit_rate <= told.belady and told.bytes_per_token == found.bytes_per_token
    with pytest.raises(UsageError, match="record one with this model"):
        plan(index, index.total, 1e8, trace=routing(experts=9))


def test_rates_are_written_as_people_write_them():
    assert parse_rate("850MB/s") == 850e6 == parse_rate("0.85 GB/s") == parse_rate("850MB")
    with pytest.raises(UsageError):
        parse_rate("fast")


def test_the_disk_is_measured_by_reading_it(tmp_path):
    path, index, _ = write_model(tmp_path)
    shares = []
    rate = measure_disk(path, BASE, index.total, index.largest, seconds=0.2, step=shares.append)
    assert rate > 1e5 and shares and shares[-1] <= 1
    with pytest.raises(StorageError):
        measure_disk(tmp_path / "gone", BASE, index.total, index.largest)
    with path.open("r+b") as f:
        f.truncate(BASE)
    with pytest.raises(StorageError, match="ends early"):
        measure_disk(path, BASE, index.total, index.largest, seconds=0.2)


# The commands


@pytest.fixture
def bundle(tmp_path):
    index, content = make_index()
    rows = []
    for r in index:
        at = BASE + r.offset
        rows.append((r.layer, r.expert, r.bits, content[at : at + r.size]))
    resident = {"model.norm.weight": np.ones(64, np.float32)}
    write_paged(tmp_path / "m.refold", index.geometry, rows, {"model_type": "mixtral"}, resident)
    routing().save(tmp_path / "t.npz")
    return tmp_path / "m.refold"


def run(capsys, *args):
    try:
        main([str(a) for a in args])
        code = 0
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_plan_command(bundle, capsys):
    code, out, _ = run(capsys, "edge", "experts", "plan", bundle, "--memory", "300KB", "--disk", "1MB/s", "--compute-ms", "20")
    assert code == 0 and "tokens per second" in out and "computing-bound from" in out
    trace = ["--trace", bundle.parent / "t.npz"]
    code, out, _ = run(capsys, "edge", "experts", "plan", bundle, "--measure-disk", *trace, "--json")
    told = json.loads(out)
    assert code == 0 and told["budget"] == told["total"] and told["disk"] > 0 and told["hit_rate"] == told["belady"] > 0.9
    assert run(capsys, "edge", "experts", "plan", bundle)[0] == 2
    code, _, err = run(capsys, "edge", "experts", "plan", bundle, "--memory", "1KB", "--disk", "1MB/s")
    assert code == 2 and "cannot hold" in err and "Traceback" not in err


def test_the_replay_command(bundle, capsys):
    trace, picture = bundle.parent / "t.npz", bundle.parent / "hits.png"
    code, out, _ = run(capsys, "edge", "experts", "replay", trace, "--bundle", bundle, "--plot", picture)
    assert code == 0 and "belady" in out and "edgemoe-printed" in out and picture.stat().st_size > 1000
    some = ["--policy", "lru", "--policy", "value", "--memory", "300KB", "--tune", "--keep"]
    code, out, _ = run(capsys, "edge", "experts", "replay", trace, "--bundle", bundle, *some, "--json")
    told = json.loads(out)
    assert code == 0 and set(told["budgets"][0]) == {"slots", "lru", "value", "belady"} and told["skip"] == 30
    assert kept_weights(bundle) == ValueWeights(**told["weights"])
    assert run(capsys, "edge", "experts", "replay", trace)[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["gone.npz"], 3, "cannot be read"),
        (["t.npz", "--memory", "1MB"], 2, "--bundle"),
        (["t.npz", "--policy", "mru"], 2, "no cache policy"),
        (["t.npz", "--tune", "--keep"], 2, "--keep needs"),
        (["t.npz", "--bundle", "m.refold", "--memory", "1KB"], 2, "do not hold"),
    ],
)
def test_what_replay_cannot_do_is_said(bundle, capsys, monkeypatch, args, code, said):
    monkeypatch.chdir(bundle.parent)
    told, _, err = run(capsys, "edge", "experts", "replay", *args)
    assert told == code and said in err and "Traceback" not in err


def test_weights_that_are_damaged_are_not_used(tmp_path, caplog):
    bundle = tmp_path / "m.refold"
    assert kept_weights(bundle) is None
    (tmp_path / "m.refold.policy.json").write_text('{"fade": -1}')
    with caplog.at_level("WARNING"):
        assert kept_weights(bundle) is None
    assert "cannot be used" in caplog.text
