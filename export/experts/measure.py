"""Loss, routing and output errors of a model whose experts are read, at any bits, when a token goes through them.

transformers' own model runs; only the module that holds a block's experts is another. In memory: the resident part in float32,
one expert, and a cache of dequantised ones up to a limit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy, linear

from export.experts.source import Source, config_of, model_class
from export.experts.tokens import Windows
from export.experts.work import Variant
from refold.errors import InputError
from refold.experts import Tensor, decode, dequantise

__all__ = ["ORIGINAL", "Measure"]

ORIGINAL = 16  # "bits" of an expert as the checkpoint has it
LOGITS = 1 << 25  # numbers at a time: 128 MB
TOKENS = 1 << 12  # at a time
Key = tuple[int, int]
Pair = tuple[torch.Tensor, torch.Tensor]


class Measure:
    """Attributes:
    counts: of the last pass, how many tokens used each expert; int64 (layers, experts) in the geometry's order.
    tokens: of the last pass, how many went through each layer; (layers,).
    """

    def __init__(
        self, source: Source, variants: Mapping[int, Variant], windows: Windows, cache_bytes: int, step: Callable[[int], None]
    ) -> None:
        g = source.geometry
        self.source, self.variants, self.windows = source, variants, windows
        self._cache: OrderedDict[tuple[int, int, int], Pair] = OrderedDict()
        expert_bytes = 4 * sum(rows * columns for rows, columns in g.shapes)
        self._room = max(1, cache_bytes // expert_bytes)
        self._step = step
        self._plan: Mapping[Key, int] = {}
        self._watch: _Errors | None = None
        self._rows = {layer: i for i, layer in enumerate(g.layers)}
        self.counts = np.zeros((len(g.layers), g.experts), np.int64)
        self.tokens = np.zeros(len(g.layers), np.int64)
        self._model = self._build()

    def loss(self, plan: Mapping[Key, int]) -> float:
        """Mean over predicted tokens, in nats, with each expert at the plan's bits (ORIGINAL where it says nothing)."""
        self._plan = plan
        self.counts[:], self.tokens[:] = 0, 0
        total = 0.0
        for ids in self._batches():
            total += self._summed_loss(torch.from_numpy(ids))
            self._step(len(ids))
        if not np.isfinite(total):
            raise InputError("The model's loss is not a number on this text: the checkpoint is damaged.", code="not-finite")
        return total / self._predicted

    def count(self, layer: int, expert: int) -> int:
        """Of the last pass: tokens that used the expert."""
        return int(self.counts[self._rows[layer], expert])

    def frequency(self) -> dict[Key, float]:
        """Of the last pass: each expert's share of its layer's tokens."""
        g = self.source.geometry
        share = self.counts / np.maximum(self.tokens, 1)[:, None]
        return {(layer, e): float(share[i, e]) for i, layer in enumerate(g.layers) for e in range(g.experts)}

    def output_errors(self, bits: tuple[int, ...]) -> dict[Key, dict[int, float]]:
        """What each expert alone, at those bits, adds to the squared error of its layer's output on the text."""
        self._watch = _Errors(bits, self.counts.shape)
        try:
            self.loss({})
            errors = self._watch.errors
        finally:
            self._watch = None
        return {
            (layer, e): {b: float(errors[n, i, e]) for n, b in enumerate(bits)}
            for layer, i in self._rows.items()
            for e in range(self.source.geometry.experts)
        }

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        ids = self.windows.ids
        vocabulary = int(self.source.checkpoint.config.get("vocab_size", 1))
        size = max(1, min(TOKENS, LOGITS // max(vocabulary, 1)) // ids.shape[1])
        for start in range(0, len(ids), size):
            yield ids[start : start + size]

    @property
    def _predicted(self) -> int:
        n, length = self.windows.ids.shape
        return int(n * (length - length // 2) if self._seq2seq else n * (length - 1))

    @property
    def _seq2seq(self) -> bool:
        return not self.source.family.architecture.endswith("CausalLM")

    @torch.inference_mode()
    def _summed_loss(self, ids: torch.Tensor) -> float:
        """An encoder-decoder reads the first half of a window and predicts the second."""
        if self._seq2seq:
            half = ids.shape[1] // 2
            start = int(self.source.checkpoint.config.get("decoder_start_token_id") or 0)
            target = ids[:, half:]
            before = torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], 1)
            logits = self._model(input_ids=ids[:, :half], decoder_input_ids=before, use_cache=False).logits
        else:
            target = ids[:, 1:]
            logits = self._model(input_ids=ids[:, :-1], use_cache=False).logits
        return float(cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum"))

    def _build(self) -> Any:
        source, g = self.source, self.source.geometry
        with _parameters_without_memory():
            model = model_class(source.family)(config_of(source.checkpoint))
        for layer, name in source.modules.items():
            model.set_submodule(name, _ReadExperts(self, layer, g.gated, g.activation))
        state = {}
        for t in source.resident:
            values = Tensor(t.dtype, t.shape, t.read()).numpy()
            state[t.name] = torch.from_numpy(values.astype(np.float32) if values.dtype.kind == "f" else values.copy())
        missing = set(model.load_state_dict(state, strict=False, assign=True).missing_keys)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)  # as from_pretrained: what is stored twice stays two
        empty = [n for n, p in model.named_parameters() if p.is_meta]
        if empty:
            raise InputError(f"{source.checkpoint.folder} lacks {empty[0]}: the checkpoint is incomplete.", code="checkpoint")
        return model.eval().requires_grad_(False)

    def weights(self, layer: int, expert: int, bits: int | None = None) -> Pair:
        """float32 matrices of an expert, at the plan's bits unless others are given."""
        bits = bits or self._plan.get((layer, expert), ORIGINAL)
        key = (layer, expert, bits)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        while len(self._cache) >= self._room:
            self._cache.popitem(last=False)
        if bits == ORIGINAL:
            inner, outer = self.source.weights(layer, expert)
        else:
            record = self.variants[bits].read(layer, expert)
            inner, outer = (dequantise(m) for m in decode(record, self.source.geometry.shapes, layer, expert))
        self._cache[key] = torch.from_numpy(inner), torch.from_numpy(outer)
        return self._cache[key]

    def route(self, layer: int, chosen: torch.Tensor, tokens: int) -> None:
        """Counts a pass through a layer. chosen: expert numbers, any shape."""
        row = self._rows[layer]
        self.counts[row] += np.bincount(chosen.flatten().numpy(), minlength=self.counts.shape[1])[: self.counts.shape[1]]
        self.tokens[row] += tokens

    def watched(self) -> _Errors | None:
        return self._watch

    def row(self, layer: int) -> int:
        return self._rows[layer]


class _Errors:
    def __init__(self, bits: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.bits, self.errors = bits, np.zeros((len(bits), *shape))


class _ReadExperts(nn.Module):
    """Stands where transformers has a block's experts."""

    def __init__(self, owner: Measure, layer: int, gated: bool, activation: str) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self._owner = [owner]  # in a list: the owner is no submodule
        self._layer, self._gated, self._act = layer, gated, ACT2FN[activation]

    def _expert(self, x: torch.Tensor, pair: Pair) -> torch.Tensor:
        h = linear(x, pair[0])
        if self._gated:
            gate, up = h.chunk(2, dim=-1)
            return linear(self._act(gate) * up, pair[1])
        return linear(self._act(h), pair[1])

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden: float32 (tokens, width); index, weights: (tokens, top k). Switch gives a mask (tokens, 1, experts) for an
        index, all zero where a token found its expert full."""
        owner, shape = self._owner[0], hidden.shape
        hidden = hidden.reshape(-1, shape[-1])
        kept = torch.ones_like(weights, dtype=torch.bool)
        if index.dim() == 3:
            kept, index = index.any(-1), index.argmax(-1)
        owner.route(self._layer, index[kept], len(hidden))
        out, watch = torch.zeros_like(hidden), owner.watched()
        for expert in torch.unique(index[kept]).tolist():
            token, slot = torch.where((index == expert) & kept)
            x, share = hidden[token], weights[token, slot, None].to(hidden.dtype)
            y = self._expert(x, owner.weights(self._layer, expert)) * share
            out.index_add_(0, token, y)
            if watch is not None:
                for n, bits in enumerate(watch.bits):
                    off = self._expert(x, owner.weights(self._layer, expert, bits)) * share - y
                    watch.errors[n, owner.row(self._layer), expert] += float(off.square().sum())
        return out.reshape(shape)


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters made inside are "meta"; buffers, which no checkpoint holds, are computed as always."""
    real = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        real(self, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = real  # type: ignore[method-assign]
