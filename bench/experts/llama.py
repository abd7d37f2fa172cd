"""llama.cpp as a peer, through llama-cpp-python's ctypes: mmap, CPU alone; repacked where everything is in memory.

The high-level class hides what matters here (extra buffer types, the callback that sees the routing), so the C functions are
called. The package is searched on the import path, then in the folder REFOLD_LLAMA_CPP names (made by
`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-deps --target FOLDER llama-cpp-python==0.3.36`).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
import time
from typing import Any

import numpy as np

from bench.experts.job import F32, Job, Outcome, drive
from refold.errors import UsageError

__all__ = ["available", "run"]

VARIABLE = "REFOLD_LLAMA_CPP"
CONTEXT = 512  # its cache of keys and values is allocated at once


def available() -> str:
    """Why llama.cpp cannot be run; empty when it can."""
    folder = os.environ.get(VARIABLE)
    if folder and folder not in sys.path:
        sys.path.append(folder)  # behind everything else: the folder may hold other packages of other versions
    if importlib.util.find_spec("llama_cpp") is None:
        return f"llama-cpp-python is not installed, and {VARIABLE} names no folder that has it"
    return ""


def _library() -> Any:
    reason = available()
    if reason:
        raise UsageError(f"llama.cpp cannot be measured: {reason}.")
    return importlib.import_module("llama_cpp")


def run(job: Job) -> Outcome:
    """Options: threads (2), repack (weights rearranged for the processor's kernels when loaded: no mapping then), routing: 1 to
    keep each token's experts (slower: never while timing)."""
    c = _library()
    started = time.perf_counter()
    quiet = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(quiet, None)
    c.llama_backend_init()
    settings = c.llama_model_default_params()
    repack = bool(job.options.get("repack"))
    settings.n_gpu_layers, settings.use_extra_bufts = 0, repack
    settings.load_mode = c.LLAMA_LOAD_MODE_NONE if repack else c.LLAMA_LOAD_MODE_MMAP
    settings.lazy_mode = c.LLAMA_LAZY_MODE_OFF
    model = c.llama_model_load_from_file(job.model.encode(), settings)
    if not model:
        raise UsageError(f"llama.cpp cannot load {job.model}.")
    seen = _Routing(c) if job.options.get("routing") else None
    context = c.llama_init_from_model(model, _context(c, int(job.options.get("threads", 2)), seen))
    if not context:
        raise UsageError(f"llama.cpp cannot make a context for {job.model}.")
    words = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    held, position = c.llama_batch_init(1, 0, 1), 0
    held.n_tokens, held.n_seq_id[0], held.seq_id[0][0], held.logits[0] = 1, 1, 0, 1

    def step(word: int) -> F32:
        nonlocal position
        if position == CONTEXT:
            c.llama_memory_clear(c.llama_get_memory(context), True)
            position = 0
        held.token[0], held.pos[0] = word, position
        position += 1
        if seen is not None:
            seen.token()
        code = c.llama_decode(context, held)
        if code:
            raise UsageError(f"llama.cpp's decode ended with {code}.")
        return np.ctypeslib.as_array(c.llama_get_logits(context), shape=(words,))

    try:
        out = drive(job, step, words, time.perf_counter() - started)
        out.details["version"] = str(c.__version__)
        if seen is not None:
            out.routing = seen.tokens
        return out
    finally:
        c.llama_batch_free(held)
        c.llama_free(context)
        c.llama_model_free(model)


def _context(c: Any, threads: int, seen: _Routing | None) -> Any:
    settings = c.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, 32, 32
    settings.n_threads = settings.n_threads_batch = threads
    settings.op_offload = settings.offload_kqv = False
    if seen is not None:
        settings.cb_eval = seen.callback
    return settings


class _Routing:
    """Reads each layer's chosen experts where the graph makes them (tensors named ffn_moe_topk-LAYER)."""

    def __init__(self, c: Any) -> None:
        self.tokens: list[list[list[int]]] = []
        base = _loaded("libggml-base")
        self._name, self._data = base.ggml_get_name, base.ggml_get_data
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._data.restype, self._data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self._elements = base.ggml_nelements
        self._elements.restype, self._elements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
        self.callback = c.ggml_backend_sched_eval_callback(self._see)

    def token(self) -> None:
        self.tokens.append([])

    def _see(self, tensor: int, ask: bool, _: int) -> bool:
        if not self._name(tensor).startswith(b"ffn_moe_topk-"):
            return not ask
        if not ask:
            count = self._elements(tensor)
            found = (ctypes.c_int32 * count).from_address(self._data(tensor))
            self.tokens[-1].append(list(found))
        return True


def _loaded(name: str) -> ctypes.CDLL:
    """A library that llama_cpp has loaded already, by the path the process knows it under."""
    with open("/proc/self/maps") as f:  # noqa: PTH123 - a line at a time: it is no file to read whole
        for line in f:
            path = line.rsplit(" ", 1)[-1].strip()
            if name in path:
                return ctypes.CDLL(path)
    raise UsageError(f"llama.cpp was built without {name}: its routing cannot be seen.")
