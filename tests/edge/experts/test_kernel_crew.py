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


@pytest.fixture
def one_thread_afterwards():
    yield
    kernel.set_threads(1)


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


def test_half_matrices_are_the_same_bits_by_any_number_of_threads(one_thread_afterwards: None) -> None:
    if not kernel.is_native():
        pytest.skip("no native kernel")
    rng = torch.Generator().manual_seed(0)
    for rows in (2048, 2051):
        weight = torch.randn(rows, 1024, generator=rng).half()
        x = torch.randn(3, 1024, generator=rng)
        kernel.set_threads(1)
        alone = kernel.half(weight, x)
        for threads in (2, 3):
            kernel.set_threads(threads)
            assert torch.equal(kernel.half(weight, x), alone)
            assert torch.equal(kernel.half(weight[:5], x), alone[:, :5])
