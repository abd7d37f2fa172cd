"""The pager over real files: right bytes under any budget, honest memory, nothing lost when a disk fails."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from expert_files import BASE, expected, make_index, until, write_model

from edge.experts.faulty import FaultyFile
from edge.experts.pager import Pager, PagerSettings
from edge.experts.policies import POLICIES
from refold.errors import BundleError, StorageError, UsageError
from refold.experts import decode

LAYERS, EXPERTS = 3, 8
MIXED = {(layer, e): (2, 4, 8)[(layer + e) % 3] for layer in range(LAYERS) for e in range(EXPERTS)}
QUIET = PagerSettings(paths="off", warm=False)


@pytest.fixture
def mixed(tmp_path):
    return write_model(tmp_path, bits=MIXED, hidden=128, intermediate=64)


@pytest.fixture
def model():
    return make_index(hidden=256, intermediate=64)


def least(index, path=Path("m.refold")):
    with pytest.raises(UsageError) as told:
        Pager(path, index, BASE, 1, QUIET, FaultyFile(b""))
    return int(told.value.message.split(" take ")[1].split(".")[0].replace(",", ""))


def over(model, budget=None, **settings):
    """A pager over a double."""
    index, content = model
    file = FaultyFile(content)
    chosen = PagerSettings(**{"paths": "off", "warm": False, "block": 4096, "threads": 1} | settings)
    return Pager(Path("m.refold"), index, BASE, budget or index.total, chosen, file), file


def same(records, content, index, layer, experts):
    for e, record in zip(experts, records, strict=True):
        assert record.tobytes() == expected(content, index, layer, e)
        decode(record, index.geometry.shapes, layer, e)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_records_are_those_of_the_file_under_every_policy_and_budget(mixed, share):
    path, index, content = mixed
    rng = np.random.default_rng(1)
    budget = max(least(index, path), int(index.total * share))
    for policy in POLICIES:
        with Pager(path, index, BASE, budget, PagerSettings(policy=policy, paths="off")) as pager:
            for _ in range(8):
                for layer in range(LAYERS):
                    wanted = rng.choice(EXPERTS, 2, replace=False).tolist()
                    pager.hint((layer + 1) % 3, rng.choice(EXPERTS, 4, replace=False).tolist())
                    with pager.use(layer, wanted) as records:
                        same(records, content, index, layer, wanted)
                    assert pager.counters.resident_bytes <= budget
                pager.token()
            c = pager.counters
            assert c.asked == 8 * LAYERS * 2 == c.hits + c.covered + c.misses
            assert c.bytes_read == c.demand_bytes + c.ahead_bytes and c.tokens == 8
            assert sum(t.bytes_read for t in pager.history) <= c.bytes_read and len(pager.history) == 8


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_union_larger_than_memory_comes_in_waves_each_expert_once(mixed, share):
    path, index, content = mixed
    budget = max(least(index, path), int(index.total * share))
    with Pager(path, index, BASE, budget, QUIET) as pager:
        for layer in (0, 1, 2, 1):
            seen = []
            for experts, records in pager.waves(layer, range(EXPERTS)):
                same(records, content, index, layer, experts)
                seen += experts
                assert pager.counters.resident_bytes <= budget
            assert sorted(seen) == list(range(EXPERTS))
        assert pager.counters.asked == 4 * EXPERTS
        assert not pager.cache.held.any()


def test_waves_begin_with_what_is_in_memory_and_read_meanwhile(model):
    pager, file = over(model)
    with pager:
        with pager.use(0, [5, 2]):
            pass
        begun = len(file.reads)
        file.gate.clear()
        waves = pager.waves(0, [0, 1, 2, 3, 5])
        experts, _ = next(waves)
        assert experts == [2, 5]  # nothing was waited for
        until(lambda: len(file.reads) > begun)  # the disk is at work while the caller computes
        file.gate.set()
        assert sorted(e for es, _ in waves for e in es) == [0, 1, 3]
        assert pager.counters.hits == 2


def test_leaving_waves_early_holds_nothing(model):
    pager, _ = over(model)
    with pager:
        for _ in pager.waves(1, range(EXPERTS)):
            break
        assert not pager.cache.held.any()
        with pager.use(1, range(EXPERTS)):
            pass


def test_a_hit_was_there_before_and_not_by_read_ahead_of_the_same_token(model):
    pager, _ = over(model)

    def come():
        until(lambda: pager._store.idle)

    with pager:
        with pager.use(0, [0, 1]):
            pass  # two misses
        pager.hint(1, [3, 4])
        come()
        with pager.use(1, [3, 5]):
            pass  # one covered, one miss; 4 was wasted
        pager.token()
        with pager.use(0, [0, 2]):
            pass  # one hit, one miss
        with pager.use(1, [4, 5]):
            pass  # two hits: 4 came for an earlier token
        c = pager.counters
        assert (c.asked, c.hits, c.covered, c.late, c.misses) == (8, 3, 1, 0, 4)
        assert (c.ahead_useful, c.ahead_wasted, c.ahead_wasted_bytes) == (1, 1, pager.index[1, 4].size)
        assert c.hit_rate == 3 / 8 and c.coverage == 1 / 8
        assert c.bytes_read == 6 * pager.index.largest == c.demand_bytes + c.ahead_bytes
        assert [t.asked for t in pager.history] == [4]


def test_a_hint_for_the_next_token_counts_for_that_token(model):
    pager, _ = over(model)
    with pager:
        with pager.use(0, [0, 1]), pager.use(2, [0, 1]):
            pass
        pager.hint(0, [6])
        pager.token()
        until(lambda: pager._store.idle)
        with pager.use(0, [6, 0]):
            pass
        assert (pager.counters.covered, pager.counters.hits, pager.counters.ahead_useful) == (1, 1, 1)


def test_demand_never_waits_for_read_ahead_and_wrong_guesses_are_cancelled(model):
    pager, file = over(model)
    blocks = pager.index.largest // 4096
    with pager:
        file.gate.clear()
        pager.hint(0, [1, 2, 3])
        until(lambda: len(file.reads) == 1)
        done = threading.Event()

        def ask():
            with pager.use(0, [2, 7]):
                done.set()

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: pager.counters.asked == 2)
        file.gate.set()
        thread.join(10)
        assert done.is_set()
        until(lambda: pager._store.idle)
        assert len(file.reads) == 1 + 2 * blocks  # one block of 1, then 2 and 7 whole; 3 never
        c = pager.counters
        assert (c.covered, c.late, c.misses, c.ahead_useful, c.ahead_wasted) == (1, 1, 1, 1, 2)
        assert c.ahead_wasted_bytes == 4096


def test_a_slow_disk_is_only_slow_and_counts_as_stall(model):
    pager, file = over(model)
    file.delay = 0.005
    with pager:
        with pager.use(0, [1]) as (record,):
            assert record.tobytes() == expected(file.content, pager.index, 0, 1)
        assert pager.counters.stall_seconds >= 0.005 * (pager.index.largest // 4096) * 0.9
        stalled = pager.counters.stall_seconds
        with pager.use(0, [1]):
            pass
        assert pager.counters.stall_seconds == stalled


def test_a_damaged_record_names_its_expert_and_others_go_on(model):
    pager, file = over(model)
    file.flip = {BASE + pager.index[1, 6].offset + 100}
    with pager:
        with pytest.raises(BundleError, match="Expert 6 of layer 1"), pager.use(1, [5, 6]):
            pass
        with pytest.raises(BundleError, match="Expert 6 of layer 1"):
            list(pager.waves(1, range(EXPERTS)))
        assert not pager.cache.held.any()
        with pager.use(1, [5, 4]) as records:
            same(records, file.content, pager.index, 1, [5, 4])
        file.flip.clear()
        with pager.use(1, [6]) as records:
            same(records, file.content, pager.index, 1, [6])


def test_a_disk_that_fails_and_comes_back(model):
    pager, file = over(model)
    with pager:
        file.fail = {BASE + pager.index[2, 0].offset + 1: errno.EIO}
        pager.hint(2, [0])
        until(lambda: pager._store.idle)  # a failed read-ahead is nobody's error yet
        with pytest.raises(StorageError, match="Expert 0 of layer 2"), pager.use(2, [0, 1]):
            pass
        file.fail.clear()
        with pager.use(2, [0, 1]) as records:
            same(records, file.content, pager.index, 2, [0, 1])


def test_the_least_budget_works_and_a_byte_less_is_refused_with_it(mixed):
    path, index, content = mixed
    budget = least(index, path)
    with pytest.raises(UsageError, match=f"{budget:,}") as told:
        Pager(path, index, BASE, budget - 1, QUIET)
    assert told.value.code == "budget"
    with Pager(path, index, BASE, budget, PagerSettings(paths="off")) as pager:
        for layer in range(LAYERS):
            for e in range(EXPERTS):
                with pager.use(layer, [e, (e + 3) % EXPERTS]) as records:
                    same(records, content, index, layer, [e, (e + 3) % EXPERTS])


def test_more_than_memory_holds_at_once_is_refused_not_waited_for(model):
    index, _ = model
    pager, _ = over(model, least(index))
    with pager, ExitStack() as stack:
        with pytest.raises(UsageError, match="waves"):
            stack.enter_context(pager.use(0, range(EXPERTS)))
        stack.enter_context(pager.use(0, [0, 1, 2]))
        with pytest.raises(UsageError, match="holds all"):
            stack.enter_context(pager.use(1, [0]))
        with pytest.raises(UsageError, match="holds all"):
            list(pager.waves(1, range(EXPERTS)))
        stack.close()
        with pager.use(1, [0]):
            pass


def test_what_is_not_there_is_said(model):
    pager, _ = over(model)
    with pager:
        for layer, experts in ((9, [0]), (0, [8]), (0, [-1])):
            with pytest.raises(UsageError, match="experts"), pager.use(layer, experts):
                pass
        pager.close()
        with pytest.raises(UsageError, match="closed"), pager.use(0, [0]):
            pass


def test_hot_experts_are_pinned_and_stay(model):
    index, content = model
    hot = {(1, 3): 0.9, (2, 2): 0.8, (0, 0): 0.4}
    index = type(index)(index.geometry, index.records, hot)
    budget = least(index) + 2 * index.largest
    pager, _ = over((index, content), budget, pin=0.5, warm=True, policy="lru")
    with pager:
        until(lambda: pager._store.idle)
        for _ in range(3):
            for layer in range(LAYERS):
                for e in range(EXPERTS):
                    with pager.use(layer, [e]):
                        pass
            assert pager.cache.present[[1 * 8 + 3, 2 * 8 + 2]].all()
        assert pager.counters.hits == 3 * 2 + 1  # the third was warm once


def test_warming_fills_memory_with_the_most_frequent(model):
    index, content = model
    often = {(layer, e): 0.3 + 0.01 * e for layer in range(LAYERS) for e in range(EXPERTS)}
    pager, _ = over((type(index)(index.geometry, index.records, often), content), 9 * index.largest, warm=True)
    with pager:
        until(lambda: pager._store.idle)
        with pager.use(2, [7, 6]):
            pass
        assert pager.counters.hits == 2 and pager.counters.ahead_wasted == 0


def test_threads_share_a_pager(mixed):
    path, index, content = mixed
    wrong = []
    with Pager(path, index, BASE, least(index, path) + 3 * index.largest, QUIET) as pager:

        def run(seed):
            rng = np.random.default_rng(seed)
            try:
                for _ in range(40):
                    layer = int(rng.integers(LAYERS))
                    if rng.random() < 0.2:
                        for experts, records in pager.waves(layer, rng.permutation(EXPERTS)[:6]):
                            same(records, content, index, layer, experts)
                    else:
                        wanted = rng.choice(EXPERTS, 2, replace=False).tolist()
                        with pager.use(layer, wanted) as records:
                            same(records, content, index, layer, wanted)
                    pager.hint((layer + 1) % LAYERS, rng.permutation(EXPERTS)[:3].tolist())
            except Exception as e:
                wrong.append(e)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(t.is_alive() for t in threads)
        assert pager.counters.resident_bytes <= pager.budget and not pager.cache.held.any()


def test_what_is_kept_of_tokens_has_an_end(model):
    pager, _ = over(model)
    with pager:
        for _ in range(600):
            pager.token()
        assert len(pager.history) == 512 and pager.counters.tokens == 600


def test_neither_threads_nor_descriptors_nor_memory_are_left(mixed):
    path, index, _ = mixed
    threads = threading.active_count()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with Pager(path, index, BASE, index.total, QUIET) as pager, pager.use(0, range(EXPERTS)):
            pass
        pager.close()
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert pager.counters.resident_bytes == 0


FLAT = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from expert_files import BASE, write_model
from edge.experts.pager import Pager, PagerSettings

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

bits = {(layer, e): (2, 4, 8)[(layer + e) % 3] for layer in range(2) for e in range(16)}
path, index, content = write_model(Path(sys.argv[2]), layers=(0, 1), experts=16, bits=bits, hidden=256, intermediate=512)
del content
rng = np.random.default_rng(0)
with Pager(path, index, BASE, index.total // 3, PagerSettings()) as pager:
    def run(tokens):
        for _ in range(tokens):
            for layer in (0, 1):
                with pager.use(layer, rng.choice(16, 2, replace=False)) as records:
                    sum(int(r.sum()) for r in records)
            pager.token()
    before = rss()
    run(20)
    first = rss()
    run(100)
    assert first - before < pager.budget + (3 << 20), (first - before, pager.budget)
    assert rss() - first < (2 << 20), rss() - first
    assert pager.counters.evictions > 100
"""


def test_memory_is_flat_and_within_the_budget_while_sizes_mix(tmp_path):
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", FLAT, here, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


TWO = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from expert_files import BASE, expected, make_index
from edge.experts.pager import Pager
path = Path(sys.argv[2])
index, _ = make_index(seed=0)
content = path.read_bytes()
rng = np.random.default_rng(int(sys.argv[3]))
for _ in range(3):
    with Pager(path, index, BASE, index.total // 2) as pager:
        for _ in range(30):
            for layer in range(3):
                e = int(rng.integers(8))
                with pager.use(layer, [e]) as (record,):
                    assert record.tobytes() == expected(content, index, layer, e)
            pager.token()
"""


def test_two_processes_share_a_bundle_and_leave_one_whole_path_table(tmp_path):
    path, index, _ = write_model(tmp_path)
    here = str(Path(__file__).parent)
    runs = [
        subprocess.Popen([sys.executable, "-c", TWO, here, str(path), str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for run in runs:
        _, told = run.communicate(timeout=120)
        assert run.returncode == 0, told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.refold", "m.refold.paths.npz"]
    with Pager(path, index, BASE, index.total) as pager:
        assert pager.paths is not None and pager.paths.predict(0) is None  # no path yet in this run
        with pager.use(0, [0]), pager.use(1, [0]):
            pass
        assert pager.paths.predict(2) is not None  # known from the runs before
