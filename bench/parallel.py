"""Pieces of a benchmark side by side, each in a fresh process; or one after the other in this one."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

__all__ = ["Inline", "executor", "one_core_each"]

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


def one_core_each(processes: int) -> ProcessPoolExecutor:
    """Fresh processes, also where it is one, that compute on a core each: the pool fills the others."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
