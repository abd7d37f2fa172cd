"""One small supernet, trained for a few steps through the command line, for every test that only looks at a finished run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import elastic_nets
from elastic_nets import MODEL

from export.capture import capture, program_of
from export.elastic.folder import RunFolder
from export.elastic.space import Space
from export.elastic.supernet import Supernet
from refold.cli import main


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """(weights, pictures)."""
    return elastic_nets.write_files(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, files) -> RunFolder:
    """30 steps in which every bit-width takes part."""
    folder = tmp_path_factory.mktemp("elastic") / "run"
    weights, pictures = files
    main(
        ["export", "train", MODEL, "--weights", str(weights), "--data", str(pictures), "--preprocess",
         elastic_nets.PREPROCESS_TEXT, "--steps", "30", "--batch", "64", "--lr", "0.003", "--no-augment", "--measure", "60",
         "-o", str(folder), "--json"]
    )  # fmt: skip
    return RunFolder(folder)


@pytest.fixture(scope="session")
def fresh() -> Supernet:
    """At its first steps; not to be changed."""
    program = program_of(elastic_nets.trained(1), 16, 16)
    images, _ = elastic_nets.digits()
    x = elastic_nets.PREPROCESS.apply(images[:128])
    return Supernet.build(capture(program, 16, 16), Space(), program.graph_signature.parameters, x)
