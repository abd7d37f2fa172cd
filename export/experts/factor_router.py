"""A dense Llama whose feed-forwards are cut into experts, in torch: what its routers learn, and what it then loses.

FactorLLM (Zhao et al., arXiv 2408.11855; formulae as in its released code). An expert is a slice of the intermediate dimension,
so the sum of all is the dense feed-forward. A router is linear in the normalised hidden state; its k best experts count fully:

    output = scale * sum of the k experts

FactorLLM's scale is experts / k. Slices of one feed-forward are parts of its sum, not guesses at it: with scale 1 a small dense
model loses far less (docs/guide/experts-factor.md has both measured), so that is what is done where nothing else is asked for.
The teacher is the error of each expert alone, m_j = mean((expert_j(x) - dense(x) / scale)^2). With p = softmax(router),
and q = softmax of one at the k experts of least error and zero elsewhere,

    prior-approximate loss = sum p log(p / q)          balance loss = mean(mask of the router's k best * softmax(p))

The balance loss is FactorLLM's as released. It takes certainty from whatever is chosen, which keeps a router from settling on a
few experts early; it does not count how often each is used.

The slices stay exact: only routers are trained, each from what its own layer saw in one pass of the dense model over a text.
With hard weights the language model's own loss has no gradient for a router.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from refold.errors import InputError, UsageError

__all__ = ["FactoredMlp", "Lesson", "RouterSettings", "Shares", "collect", "generated", "loss_of", "losses", "seat", "train"]

SMALLEST = 1e-7  # of a probability in the logarithm
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class RouterSettings:
    """Attributes:
    steps, batch: of tokens. rate: Adam's, after a warm-up of a tenth, falling to zero as a cosine.
    prior, balance: weights of the two losses. seed: of the routers' first values, and of the order of tokens.
    """

    steps: int = 300
    batch: int = 1024
    rate: float = 0.01
    prior: float = 0.05
    balance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not self.rate > 0:
            raise UsageError("A router is trained for steps of 0 or more, on batches of 1 or more tokens, at a rate above 0.")
        if not (self.prior >= 0 and self.balance >= 0 and self.prior + self.balance > 0):
            raise UsageError("The weights of the router's losses are 0 or more, and not both 0.")


@dataclass(frozen=True)
class Lesson:
    """What one layer saw of a text: enough to train its router for any k.

    Attributes:
        x: float16 (n, hidden), the normalised hidden states.
        square, dot: float32 (n, experts), |expert_j(x)|^2 and expert_j(x) . dense(x). whole: (n, 1), |dense(x)|^2.
    """

    x: Tensor
    square: Tensor
    dot: Tensor
    whole: Tensor

    def errors(self, share: float) -> Tensor:
        """m_j of each token, (n, experts): the mean over `hidden` of (expert_j(x) - share * dense(x))^2."""
        return (self.square - 2 * share * self.dot + share**2 * self.whole) / self.x.shape[1]


@dataclass(frozen=True)
class Shares:
    """Of one layer's tokens, the share that each expert gets; the fraction of the teacher's experts that are chosen."""

    used: tuple[float, ...]
    agreed: float


class FactoredMlp(nn.Module):
    """A dense feed-forward, gate, up and down, seen as `experts` slices.

    Attributes:
        router: (experts, hidden). active: experts that a token uses; None: the dense feed-forward itself. scale: of their sum.
        lessons: where it is a list, what each forward teaches is appended to it.
    """

    def __init__(self, dense: Any, experts: int, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            dense.gate_proj,
            dense.up_proj,
            dense.down_proj,
            dense.act_fn,
        )
        self.experts = experts
        self.active: int | None = None
        self.scale = 1.0
        self.router = 0.02 * torch.randn(experts, self.gate_proj.in_features, generator=generator)
        self.lessons: list[Lesson] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.lessons is not None:
            self.lessons.append(self._lesson(x.flatten(0, -2), h.flatten(0, -2)))
        if self.active is None or self.active == self.experts:
            out: Tensor = self.down_proj(h)
            return out
        mask = chosen(functional.linear(x, self.router), self.active)
        h = h.reshape(*mask.shape, -1) * mask[..., None]
        routed: Tensor = self.down_proj(h.flatten(-2)) * self.scale
        return routed

    def _lesson(self, x: Tensor, h: Tensor) -> Lesson:
        slices = h.reshape(len(h), self.experts, -1).transpose(0, 1)
        down = self.down_proj.weight.reshape(x.shape[1], self.experts, -1).permute(1, 2, 0)
        each = torch.bmm(slices, down)
        whole = each.sum(0)
        return Lesson(x.half(), each.square().sum(-1).T, (each * whole).sum(-1).T, whole.square().sum(-1, keepdim=True))


def chosen(scores: Tensor, k: int) -> Tensor:
    """One at the k largest of the last dimension, zero elsewhere."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)


def losses(logits: Tensor, errors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Prior-approximate and balance loss of (n, experts) router outputs and errors; means over tokens."""
    p = logits.softmax(-1)
    q = chosen(-errors, k).softmax(-1)
    prior = (p * (p.clamp_min(SMALLEST).log() - q.clamp_min(SMALLEST).log())).sum(-1).mean()
    balance = (chosen(logits.detach(), k) * p.softmax(-1)).mean()
    return prior, balance


def seat(model: Any, experts: int, seed: int) -> list[FactoredMlp]:
    """Puts FactoredMlp in place of every feed-forward of a Llama model. They compute the dense one until `active` is set."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for layer in model.model.layers:
        layer.mlp = FactoredMlp(layer.mlp, experts, generator)
        out.append(layer.mlp)
    return out


@torch.no_grad()
def collect(model: Any, seats: Sequence[FactoredMlp], ids: I64, step: Callable[[int], None], batch: int = 8) -> list[Lesson]:
    """One pass of the dense model over windows `ids` (windows, length): a lesson per layer, of tokens * hidden * 2 bytes."""
    for s in seats:
        s.active, s.lessons = None, []
    try:
        for at in range(0, len(ids), batch):
            some = torch.from_numpy(ids[at : at + batch])
            model.model(some, use_cache=False)
            step(len(some))
        return [Lesson(*(torch.cat(parts) for parts in zip(*map(_parts, s.lessons or []), strict=True))) for s in seats]
    finally:
        for s in seats:
            s.lessons = None


def _parts(lesson: Lesson) -> tuple[Tensor, ...]:
    return lesson.x, lesson.square, lesson.dot, lesson.whole


def train(start: Tensor, lesson: Lesson, k: int, scale: float, settings: RouterSettings) -> tuple[Tensor, Shares]:
    """A layer's router for k active experts, from its values at the start; and how it then shares out the lesson's tokens.

    Raises InputError: the dense model gave numbers that are not finite.
    """
    router = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([router], settings.rate, betas=(0.9, 0.95))
    errors, x, n = lesson.errors(1 / scale), lesson.x, len(lesson.x)
    warm = max(1, settings.steps // 10)
    order = torch.Generator().manual_seed(settings.seed)
    if not bool(torch.isfinite(errors).all() and torch.isfinite(x).all()):
        raise InputError("The dense model gives numbers that are not finite on the router's text.", code="not-finite")
    for i in range(settings.steps):
        share = (i + 1) / warm if i < warm else 0.5 * (1 + math.cos(math.pi * (i - warm) / max(1, settings.steps - warm)))
        optimiser.param_groups[0]["lr"] = settings.rate * share
        some = torch.randint(n, (min(n, settings.batch),), generator=order)
        prior, balance = losses(functional.linear(x[some].float(), router), errors[some], k)
        total = settings.prior * prior + settings.balance * balance
        (router.grad,) = torch.autograd.grad(total, (router,))
        optimiser.step()
    found = router.detach()
    ours = chosen(functional.linear(x.float(), found), k)
    agreed = float((ours * chosen(-errors, k)).sum()) / (n * k)
    return found, Shares(tuple(float(u) for u in ours.mean(0)), agreed)


@torch.no_grad()
def loss_of(
    model: Any,
    seats: Sequence[FactoredMlp],
    ids: I64,
    active: int | None,
    step: Callable[[int], None],
    scale: float = 1.0,
    batch: int = 8,
) -> float:
    """Mean loss in nats over windows `ids` (windows, length + 1) with `active` experts, times `scale`; None: dense.

    Raises InputError: not finite.
    """
    for s in seats:
        s.active, s.scale = active, scale
    total = 0.0
    for at in range(0, len(ids), batch):
        some = torch.from_numpy(ids[at : at + batch])
        logits = model(some[:, :-1], use_cache=False).logits
        total += float(functional.cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten(), reduction="sum"))
        step(len(some))
    if not math.isfinite(total):
        raise InputError("The model's loss is not a number on this text: the checkpoint is damaged.", code="not-finite")
    return total / float(ids.shape[0] * (ids.shape[1] - 1))


@torch.no_grad()
def generated(model: Any, windows: int, length: int, seed: int, step: Callable[[int], None], batch: int = 32) -> I64:
    """Text that the dense model draws from its own distribution, from its first token on: int64 (windows, length).

    Raises InputError: it names no first token.
    """
    first = model.config.bos_token_id
    if first is None:
        raise InputError("The model names no first token, so it cannot begin a text: give one with --router-text.", code="text")
    generator = torch.Generator().manual_seed(seed)
    out = []
    for at in range(0, windows, batch):
        ids = torch.full((min(batch, windows - at), 1), int(first))
        held = None
        for _ in range(length - 1):
            told = model(ids[:, -1:] if held is not None else ids, cache=held, use_cache=True)
            held = told.cache
            drawn = torch.multinomial(told.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], 1)
        out.append(ids.numpy())
        step(len(ids))
    return np.concatenate(out)
