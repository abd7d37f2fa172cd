"""The pager over real files: right bytes under any budget, honest memory, nothing lost when a disk fails."""

from __future__ import annotations

import numpy as np
import pytest
from expert_files import BASE, expected, make_index, write_model

from edge.experts.faulty import FaultyFile
from edge.experts.pager import Pager, PagerSettings
from edge.experts.policies import POLICIES
from refold.errors import BundleError, StorageError, UsageError
from refold.experts import decode

MIXED = {(layer, e): (2, 4, 8)[(layer + e) % 3] for layer in range(3) for e in range(8)}


@pytest.fixture
def mixed(tmp_path):
    return write_model(tmp_path, bits=MIXED, hidden=128, intermediate=64)


def test_records_are_those_of_the_file_under_every_policy_and_budget(mixed):
    path, index, content = mixed
    rng = np.random.default_rng(1)
    for policy in POLICIES:
        for share in (0.0, 0.3, 1.0):
            settings = PagerSettings(policy=policy, paths="off")
            least = Pager(path, index, BASE, index.total, settings)
            budget = max(least.floor, int(index.total * share))
            least.close()
            with Pager(path, index, BASE, budget, settings) as pager:
                for _ in range(12):
                    for layer in index.geometry.layers:
                        wanted = rng.choice(8, 2, replace=False).tolist()
                        pager.hint((layer + 1) % 3, rng.choice(8, 4, replace=False).tolist())
                        with pager.use(layer, wanted) as records:
                            for e, record in zip(wanted, records, strict=True):
                                assert record.tobytes() == expected(content, index, layer, e)
                                decode(record, index.geometry.shapes, layer, e)
                        assert pager.counters.resident_bytes <= budget
                    pager.token()
                c = pager.counters
                assert c.asked == 72 == c.hits + c.covered + c.misses
                assert c.tokens == 12
