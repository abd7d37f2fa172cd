"""Threads that compute: each item once, the same bits, and the first failure is told when nobody works any more."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from edge.experts import kernel
from edge.experts.kernel.crew import Crew


@pytest.fixture
def crew():
    made = Crew(4)
    yield made
    made.close()


def test_every_item_is_done_once_and_threads_really_work_together(crew: Crew) -> None:
    meeting, done = threading.Barrier(4, timeout=20), list[int]()

    def work(item: int) -> None:
        if item < 4:
            meeting.wait()  # passes only when four are at work at once
        done.append(item)

    crew.each(work, range(50))
    assert sorted(done) == list(range(50))


def test_inference_mode_reaches_the_helpers(crew: Crew) -> None:
    meeting, modes = threading.Barrier(4, timeout=20), list[bool]()

    def work(_: int) -> None:
        meeting.wait()
        modes.append(torch.is_inference_mode_enabled())

    with torch.inference_mode():
        crew.each(work, range(4))
    crew.each(work, range(4))
    assert modes == [True] * 4 + [False] * 4


@pytest.mark.parametrize("guilty", range(4))
def test_a_failure_is_raised_when_all_have_stopped_and_the_rest_is_left(crew: Crew, guilty: int) -> None:
    meeting, ended, begun = threading.Barrier(4, timeout=20), list[int](), list[int]()

    def work(item: int) -> None:
        begun.append(item)
        if item < 4:
            meeting.wait()
            if item == guilty:
                raise OSError("the disk")
        time.sleep(0.001)
        ended.append(item)

    with pytest.raises(OSError, match="the disk"):
        crew.each(work, range(10_000))
    assert len(ended) == len(begun) - 1 < 10_000
    crew.each(ended.append, [-1])  # and it goes on working
    assert ended[-1] == -1


def test_a_closed_crew_leaves_the_work_to_the_caller() -> None:
    crew, done = Crew(3), list[int]()
    crew.close()
    crew.each(done.append, range(5))
    assert done == [0, 1, 2, 3, 4]


def test_half_matrices_are_the_same_bits_by_any_number_of_threads() -> None:
    if not kernel.is_native():
        pytest.skip("no native kernel")
    rng = torch.Generator().manual_seed(0)
    for rows in (2048, 2051):
        weight = torch.randn(rows, 1024, generator=rng).half()
        x = torch.randn(3, 1024, generator=rng)
        alone = kernel.half(weight, x)
        for threads in (2, 3):
            crew = Crew(threads)
            assert torch.equal(kernel.half(weight, x, crew), alone)
            assert torch.equal(kernel.half(weight[:5], x, crew), alone[:, :5])
            crew.close()
