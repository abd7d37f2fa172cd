"""A language model that does not fit, running: `load(path, settings)` gives a transformers model around a pager.

with load("m.refold", Settings(memory=512 << 20)) as running:
    writing = running.generate("Once upon a time", Sampling(max_tokens=100))
    for piece in writing:
        print(piece.text, end="")
    print(writing.numbers())

model_build.py       shapes on the meta device, resident tensors, experts bound to the pager
implementation.py    the experts' arithmetic; implementation_lookahead.py says what to read next
generate.py          one token after another; generate_text.py turns them into text
model_gains.py       RMS gains exchanged between two tokens, as a release asks
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edge.experts import kernel
from edge.experts.budget import resolve
from edge.experts.counters import Counters
from edge.experts.decode.choose import try_out
from edge.experts.decode.plan import FALLBACK_TOKENS, Defaults, Plan
from edge.experts.decode.sampling import Sampling
from edge.experts.decode.stops import Stops
from edge.experts.generate import Stream
from edge.experts.generate_text import Codec, codec
from edge.experts.implementation import Cancelled, Paging, never
from edge.experts.kernel.crew import Crew
from edge.experts.model_build import build
from edge.experts.model_gains import Gains
from edge.experts.model_halves import FEW
from edge.experts.pager import Pager, PagerSettings
from refold.bundle import silent
from refold.errors import UsageError
from refold.experts import PagedModel

__all__ = ["Cancelled", "Numbers", "Piece", "Running", "Settings", "Writing", "load"]


@dataclass(frozen=True)
class Settings:
    """How a model is run.

    Attributes:
        memory: bytes for expert records, or "auto": from the cgroup and what the machine has free.
        policy: which record leaves the cache first; see edge/experts/policies.py.
        readers: threads that read the disk. threads: that compute; every model has its own.
        lookahead: read ahead what the next layer will probably ask for.
        direct: read past the page cache where the file system permits it.
        verify: when a record's digest is checked: at its first reading, at every reading, never.
        resident: matrices that are no experts: "stored" leaves those of 16 bits in 16 bits where the native kernel is,
            "float32" widens them once. The same numbers; sums differ in their last bits.

    Raises:
        UsageError: out of range.
    """

    memory: int | Literal["auto"] = "auto"
    policy: str = "value"
    readers: int = 2
    threads: int = 1
    lookahead: bool = True
    direct: bool = True
    verify: Literal["first", "always", "never"] = "first"
    resident: Literal["stored", "float32"] = "stored"

    def __post_init__(self) -> None:
        if self.memory != "auto" and (not isinstance(self.memory, int) or self.memory < 1):
            raise UsageError(f"Memory is a number of bytes or auto, not {self.memory!r}.", code="budget")
        for name in ("readers", "threads"):
            if not 1 <= getattr(self, name) <= 64:
                raise UsageError(f"{name} is 1 to 64, not {getattr(self, name)}.")
        if self.resident not in ("stored", "float32"):
            raise UsageError(f"Resident matrices are stored or float32, not {self.resident!r}.")
        self.pager()

    @property
    def halves(self) -> bool:
        return self.resident == "stored" and kernel.is_native()

    def pager(self) -> PagerSettings:
        return PagerSettings(
            policy=self.policy, threads=self.readers, ahead=self.lookahead, direct=self.direct, verify=self.verify
        )


@dataclass(frozen=True)
class Piece:
    """One token as it came.

    Attributes:
        text: what it adds to the text; empty while a character is incomplete or for a stop token.
        logprob, top: as `decode.choose.Chosen`, where asked for. A last piece may bring text alone that was held back; it
            repeats the token and has no logprob.
        at: characters of the text before it, known where logprobs are asked for. ends: it is a stop token.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    at: int = 0
    ends: bool = False


@dataclass(frozen=True)
class Numbers:
    """What a text cost. Of the tokens after the first, unless named otherwise; times in seconds.

    Attributes:
        prompt_tokens, tokens: read, written. first_token: from the call to the first token. tokens_per_second: nan for
            one token.
        hit_rate: share of experts that were in memory before their layer asked. coverage: share that read-ahead brought.
        bytes_per_token: from the disk. stall: waiting for the disk. prompt_bytes: from the disk until the first token.
    """

    prompt_tokens: int
    tokens: int
    first_token: float
    seconds: float
    tokens_per_second: float
    hit_rate: float
    coverage: float
    bytes_per_token: float
    stall: float
    prompt_bytes: int
    prompt_stall: float


class Writing(Iterator[Piece]):
    """A text as it comes.

    Attributes:
        prompt: token ids. tokens: written so far. text: written so far, without the stop text that ended it.
        reason: "" while it goes on, then "stop" (a stop token or text), "length" or "failed". cut: a stop text ended it.
    """

    def __init__(self, running: Running, prompt: list[int], plan: Plan, cancelled: Callable[[], bool]) -> None:
        self.prompt, self.tokens, self.text, self.reason = prompt, list[int](), "", ""
        self._running = running
        self._growing = running.codec.growing(() if running.model.config.is_encoder_decoder else prompt)
        self._stops, self._grown = Stops(plan.sampling.stop or ()), 0
        self._begin, self._before = time.perf_counter(), running.pager.counters
        self._first: tuple[float, Counters] | None = None
        self._end, self._after = self._begin, self._before
        self._stream = running.stream.tokens(prompt, plan, cancelled)

    def __next__(self) -> Piece:
        """Raises Cancelled, and what `Stream.tokens` raises: then no piece came from what failed."""
        if self.reason:
            raise StopIteration
        try:
            chosen = next(self._stream)
        except StopIteration:
            return self._ended()
        except BaseException:
            self.reason = "failed"
            raise
        self._end, self._after = time.perf_counter(), self._running.pager.counters
        if self._first is None:
            self._first = (self._end, self._after)
        token, at = chosen.token, self._grown
        self.tokens.append(token)
        ends = token in self._running.codec.stops
        grown = "" if ends else self._growing.add(token)
        self._grown += len(grown)
        if chosen.logprob is not None:
            at = max(at, self._grown - self._length(token))
        text = self._stops.add(grown)
        if self.cut:
            self.close()
            self.reason = "stop"
        self.text += text
        return Piece(token, text, chosen.logprob, chosen.top, at, ends)

    def _length(self, token: int) -> int:
        """Characters of a token by itself; of part of one, as many as there are."""
        try:
            return len(self._running.codec.piece(token).decode())
        except UnicodeDecodeError:
            return self._grown

    def _ended(self) -> Piece:
        rest = self._stops.add(self._growing.end()) + self._stops.end()
        ended = self.cut or (self.tokens and self.tokens[-1] in self._running.codec.stops)
        self.reason = "stop" if ended else "length"
        if not rest:
            raise StopIteration
        self.text += rest
        return Piece(self.tokens[-1], rest)

    @property
    def cut(self) -> bool:
        return self._stops.found

    def close(self) -> None:
        self._stream.close()

    def numbers(self) -> Numbers:
        """So far; nan where nothing has been measured yet."""
        at, mid = self._first or (self._end, self._after)
        later, seconds = max(len(self.tokens) - 1, 0), self._end - at
        a, b = mid, self._after
        asked = b.asked - a.asked
        return Numbers(
            prompt_tokens=len(self.prompt),
            tokens=len(self.tokens),
            first_token=at - self._begin,
            seconds=seconds,
            tokens_per_second=later / seconds if later and seconds else math.nan,
            hit_rate=(b.hits - a.hits) / asked if asked else math.nan,
            coverage=(b.covered - a.covered) / asked if asked else math.nan,
            bytes_per_token=(b.bytes_read - a.bytes_read) / later if later else math.nan,
            stall=b.stall_seconds - a.stall_seconds,
            prompt_bytes=a.bytes_read - self._before.bytes_read,
            prompt_stall=a.stall_seconds - self._before.stall_seconds,
        )


class Running:
    """A loaded model. Several texts may be written at once, from several threads: forwards take turns, and each text is what it
    would be alone.

    Attributes:
        model: the transformers model. pager: its experts. paged: the bundle. codec: text to tokens and back.
        defaults: how texts are written where a caller does not say; `defaults.notes` names what is not honoured.
    """

    def __init__(self, paged: PagedModel, settings: Settings, progress: Callable[[int], None]) -> None:
        self.paged, self.settings = paged, settings
        self.name = paged.bundle.manifest.name or paged.path.stem
        self.defaults = Defaults.of(paged.generation_config(), paged.config, str(paged.path))
        self.codec: Codec = codec(paged, self.defaults)
        self._divide(1)
        self.pager = Pager.open(paged, resolve(settings.memory, paged, settings.halves), settings.pager())
        self._crew = Crew.of(settings.threads)
        try:
            paging = Paging(self.pager, paged.index.geometry, self._crew)
            ahead = 2 * paged.index.geometry.top_k if settings.lookahead else 0
            tensors = paged.resident_tensors(progress)
            self.model = build(paged.config, tensors, paging, str(paged.path), ahead=ahead, halves=settings.halves)
            self.model.generation_config = self.defaults.config()
            try_out(self.model, self.defaults, self.codec.stops, str(paged.path))
        except BaseException:
            self.close()
            raise
        self._turn = threading.Lock()
        self.stream = Stream(self.model, paging, self._forward, self.codec.stops, self._divide, self.defaults)
        self._gains = Gains(self.model, self._turn, self.stream.probe)

    def _divide(self, tokens: int) -> None:
        """Cores for torch: OpenMP's threads go on spinning after each of its loops, where the kernel's own would compute."""
        torch.set_num_threads(1 if tokens <= FEW and self.settings.halves else self.settings.threads)

    def _forward(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._turn:
            self._gains.settle()
            out = step()
            self.pager.token()
        return out

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        cancelled: Callable[[], bool] = never,
        tokens: int = FALLBACK_TOKENS,
    ) -> Writing:
        """Begins a text; iterate over what is returned.

        Args:
            prompt: text, or token ids. sampling: what it leaves out is as the bundle's generation_config.json says.
            tokens: at most, where neither says.
            cancelled: asked before each forward and each expert; True ends the text with `Cancelled`.

        Raises:
            InputError: an empty prompt, or one that leaves no room in the model's context.
        """
        ids = self.codec.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        return Writing(self, ids, self.stream.plan(ids, sampling or Sampling(), tokens), cancelled)

    def put_gains(self, gains: Mapping[str, NDArray[np.float32]]) -> None:
        """Exchanges RMS gains between two forwards; see `model_gains.Gains.put`."""
        self._gains.put(gains)

    def close(self) -> None:
        self.pager.close()
        if self._crew is not None:
            self._crew.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load(path: str | Path, settings: Settings | None = None, progress: Callable[[int], None] = silent) -> Running:
    """Opens a bundle and makes its model ready; close it, or use it in a `with`.

    Args:
        progress: told the bytes of each resident tensor that has been read.

    Raises:
        BundleError: damaged, truncated, or no paged model.
        ModelError: a family that is not supported.
        UsageError: a budget under the floor of one layer's experts, or another setting.
        StorageError: the file cannot be read.
    """
    return Running(PagedModel.open(path), settings or Settings(), progress)
