"""Pieces of a benchmark side by side, each in a fresh process; or one after the other in this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

__all__ = ["Inline", "executor"]

T = TypeVar("T")


class Inline(Executor):
    """Runs a piece when it is submitted: for `--processes 1` and for tests, whose fakes other processes would not see."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as e:
            future.set_exception(e)
            if not isinstance(e, Exception):
                raise
        return future


def executor(processes: int) -> Executor:
    """To be used in a `with`; at most `processes` pieces at once."""
    if processes == 1:
        return Inline()
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
