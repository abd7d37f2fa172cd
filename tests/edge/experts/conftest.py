"""A small random model, paged, and running; imported where they are asked for, as most tests here need no torch."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    import run_models

    return run_models.write(tmp_path_factory.mktemp("m") / "m.refold", run_models.random_model("mixtral"))


@pytest.fixture(scope="module")
def running(paged):
    from edge.experts.model import Settings, load

    with load(paged.path, Settings(memory=paged.index.total // 2)) as running:
        yield running
