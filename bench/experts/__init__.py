"""Experts that do not fit: our pager against llama.cpp and others, under memory caps that the kernel enforces.

    trace.py       which experts each token uses, calibrated to OLMoE      shape.py      sizes
    weights.py     a model whose routing is the trace's in every engine    gguf.py       the same model for llama.cpp
    checkpoint.py  the files, in a folder that goes away                   cgroup.py     the cap
    disk.py        eviction, and the disk's rate by the same accesses      job.py        what a run is told and tells
    paged.py llama.py accelerate_disk.py       the engines, each in a process of its own (child.py)
    lines.py       what is measured            measure.py    the runs      verify.py     equality before timing
    journal.py     runs kept for --resume      rows.py       medians and bounds          claims.py     the bars
    replayed.py    policies without a model    longrun.py    minutes of generation at 25 %
    exact.py       the same tokens with an eighth of the memory            quality.py    bits and factors
    plots.py       three pictures              benchmark.py  all of it

Importing this package imports none of them: a child process is to hold its engine and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.result import Options, Result

__all__ = ["plot", "run"]


def run(options: Options) -> Result:
    """Full: OLMoE's shape at 4 and 8 bits, 1 to 5 runs a line. Quick: a small shape, one run, each program once."""
    from bench.experts.benchmark import run as measured

    return measured(options)


def plot(result: Result, path: Path) -> None:
    """Three pictures in one file."""
    from bench.experts.plots import plot as drawn

    drawn(result, path)
