"""Small random modules full of views and in-place operators, and what becomes of each: exported, refused, or a fault of ours.

python tests/export/random_modules.py 300       # the counts, and every module that is neither exported nor refused
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import click
import export_nets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from export.engines import infer, session
from export.interpret import float_parameters, run
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.errors import InternalError, RefoldError

SIZE, WIDTH = 8, 8
KINDS = ("exported", "refused", "silent", "traceback")
PREPROCESS = export_nets.Preprocess(SIZE, SIZE, 1 / 255, (0.5, 0.45, 0.4), (0.25, 0.25, 0.3))
PICTURES = Pictures(export_nets.pictures(16, SIZE), None)
UNSEEN = PREPROCESS.apply(export_nets.pictures(24, SIZE, seed=7))
Step = Callable[["Random", Tensor, list[Tensor]], Tensor]


class Random(nn.Module):
    """A stem, steps that keep (N, WIDTH, SIZE, SIZE), and a head; `kept` are earlier activations, or views of them."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.shared, self.drop, self.relu = nn.Conv2d(WIDTH, WIDTH, 1), nn.Dropout(0.3), nn.ReLU(inplace=True)
        self.last, self.head = nn.BatchNorm2d(WIDTH), export_nets.Head(WIDTH)
        self.gain = nn.Parameter(torch.full((WIDTH, 1, 1), 0.7))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.blocks = nn.ModuleList(export_nets.ConvNorm(WIDTH, WIDTH, draw.choice((1, 3))) for _ in range(6))
        self.steps = [draw.choice(MAKERS) for _ in range(draw.randint(2, 6))]
        self.said = [maker.__name__ for maker in self.steps]
        self.steps = [maker(draw) for maker in self.steps]

    def forward(self, x: Tensor) -> Tensor:
        y, kept = self.relu(self.norm(self.stem(x))), []
        for step in self.steps:
            y = step(self, y, kept)
        return self.head(F.relu(self.last(y)))


def part(draw: random.Random) -> Callable[[Tensor], Tensor]:
    """A view of some of (N, C, H, W)."""
    k, i = draw.randint(1, WIDTH - 1), draw.randrange(WIDTH)
    return draw.choice(
        (
            lambda y: y[:, :k], lambda y: y[:, k:], lambda y: y[:, ::2], lambda y: y[:, :, 1::2], lambda y: y[:, i],
            lambda y: y.narrow(1, 0, k), lambda y: y.chunk(2, 1)[1], lambda y: y.split((k, WIDTH - k), 1)[0],
            lambda y: y.unbind(1)[i], lambda y: y.view(y.shape[0], -1), lambda y: y.flatten(2)[:, :, k:],
            lambda y: y.transpose(2, 3)[:, :, :k], lambda y: y.permute(0, 2, 3, 1)[..., :k], lambda y: y[:, k:, 1:-1, 1:-1],
            lambda y: y.reshape(y.shape[0], 2, WIDTH // 2, SIZE, SIZE)[:, 1], lambda y: y.unsqueeze(1)[:, 0, :k],
            lambda y: y, lambda y: y[:, -1:].squeeze(1), lambda y: y.select(1, i)[:, k:], lambda y: y.movedim(1, -1)[..., k:],
            lambda y: y[..., k], lambda y: y.view_as(y)[:, :k].transpose(1, 2), lambda y: y.detach()[:, k:],
        )
    )  # fmt: skip


def change(draw: random.Random) -> Callable[[Tensor], object]:
    """Something in place."""
    a = round(draw.uniform(-1.5, 1.5), 2)
    return draw.choice(
        (
            lambda v: v.mul_(a), lambda v: v.add_(a), lambda v: v.relu_(), lambda v: v.clamp_(-1.0, 1.5), lambda v: v.sub_(a),
            lambda v: v.clamp_(max=2.0), lambda v: v.zero_(), lambda v: v.fill_(a), lambda v: v.neg_(), lambda v: v.sigmoid_(),
            lambda v: F.leaky_relu_(v, 0.1), lambda v: v.add_(v, alpha=0.5), lambda v: v.copy_(v * a), F.hardtanh_,
            lambda v: v.div_(1.5), lambda v: v.tanh_(), lambda v: F.silu(v, inplace=True), lambda v: v.mul_(v.clone()),
        )
    )  # fmt: skip


def block(draw: random.Random) -> Step:
    """One of six blocks; used twice, its norm is refused."""
    which = draw.randrange(6)
    return lambda m, y, kept: m.relu(m.blocks[which](y))


def shared(draw: random.Random) -> Step:
    return lambda m, y, kept: F.relu(m.shared(y))


def in_place(draw: random.Random) -> Step:
    view, act = part(draw), change(draw)

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        act(view(y))
        return y

    return step


def view_first(draw: random.Random) -> Step:
    """A view taken before the change and read after it."""
    early, view, act, a = part(draw), part(draw), change(draw), draw.uniform(0.2, 0.8)

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        seen = early(y)
        act(view(y))
        return y + a * seen.mean(tuple(range(1, seen.dim())), keepdim=True).reshape(-1, 1, 1, 1)

    return step


def keep(draw: random.Random) -> Step:
    how = draw.choice((lambda y: y, lambda y: y.view(y.shape[0], WIDTH, -1), lambda y: y * 1.0, lambda y: y[:, : WIDTH // 2]))

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(how(y))
        return y

    return step


def residual(draw: random.Random) -> Step:
    inside = draw.random() < 0.5

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        other = kept[-1] if kept else y.clone()
        other = F.pad(other, (0, 0, 0, 0, 0, WIDTH - other.shape[1])) if other.dim() == 4 else other.view_as(y)
        if not inside:
            return y + other
        y += other * 0.5
        return y

    return step


def assign(draw: random.Random) -> Step:
    k, a, rows = draw.randint(1, WIDTH // 2), round(draw.uniform(-1, 1), 2), draw.random() < 0.3

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        if rows:
            y[:, :, :k] = a
        else:
            y[:, :k] = y[:, WIDTH - k :] * a + 0.1
        return y

    return step


def filled(draw: random.Random) -> Step:
    kind, stride = draw.randrange(4), draw.random() < 0.4

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        z = (torch.zeros_like(y), torch.empty_like(y), y.new_zeros(y.shape), torch.empty(y.shape[0], WIDTH, SIZE, SIZE))[kind]
        if stride:
            z[:, ::2], z[:, 1::2] = y[:, : WIDTH // 2], y[:, WIDTH // 2 :]
        else:
            z[:, : WIDTH // 2], z[:, WIDTH // 2 :] = F.relu(y[:, WIDTH // 2 :]), y[:, : WIDTH // 2] * 0.5
        return z

    return step


def dropped(draw: random.Random) -> Step:
    """Dropout in evaluation returns its own input: what changes the one changes the other."""
    act = change(draw)

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        act(m.drop(y)[:, :3])
        return y

    return step


def moved(draw: random.Random) -> Step:
    shift = (draw.randint(-2, 2), draw.randint(-2, 2))

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        y = torch.stack([y, y * 0.5], 1).sum(1).roll(shift, (2, 3))
        return torch.stack([y, y.transpose(2, 3)], 2).mean(2)

    return step


def parts(draw: random.Random) -> Step:
    act, other = change(draw), draw.random() < 0.5

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        a, b = y.chunk(2, 1)
        act(a)
        b.add_(a)
        return torch.cat([b, a], 1) if other else y

    return step


def counted(draw: random.Random) -> Step:
    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        m.calls.add_(1)
        m.seen.copy_(y.mean((0, 2, 3)))
        return y

    return step


def gained(draw: random.Random) -> Step:
    whole = draw.random() < 0.5

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        if whole:
            return y.mul_(m.gain)
        y[:, 2:4].mul_(m.gain[2:4]).add_(1 - m.gain[:2])
        return y

    return step


def reshaped(draw: random.Random) -> Step:
    act = change(draw)

    def step(m: Random, y: Tensor, kept: list[Tensor]) -> Tensor:
        z = y.unsqueeze(1)
        z.squeeze_(1)
        act(z.permute(0, 2, 3, 1).reshape(y.shape[0], -1, WIDTH))  # a copy or a view, as memory has it
        act(z.flatten(2))
        return y.permute(0, 1, 3, 2).contiguous()

    return step


MAKERS = (
    block, block, shared, in_place, in_place, in_place, view_first, view_first, keep, keep, residual, residual, assign, assign,
    filled, dropped, moved, parts, counted, gained, reshaped,
)  # fmt: skip


def random_module(seed: int) -> Random:
    """The same module for the same seed; it runs, and answers different images differently."""
    draw = random.Random(seed)
    while True:
        torch.manual_seed(seed)
        try:
            net = export_nets.settled(Random(draw), SIZE, seed)
        except RuntimeError:  # torch itself refuses: a write to memory that overlaps
            continue
        net.eval()
        with torch.no_grad():
            answers = net(torch.from_numpy(UNSEEN))
        if bool(torch.isfinite(answers).all()) and answers.std(0).max() > 0.1:
            return net


def outcome(net: nn.Module, folder: Path) -> tuple[str, str]:
    """exported, refused, silent or traceback; and why."""
    with torch.no_grad():
        truth = torch.stack([net(torch.from_numpy(image[None].copy()))[0] for image in UNSEEN]).numpy()  # as a device asks
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        done = export_model(net, folder / "m.refold", PREPROCESS, PICTURES, Options(observer="minmax"))
    except InternalError as e:
        return "traceback", str(e)
    except RefoldError as e:
        return "refused", f"{e.code}: {e.message}"
    except Exception as e:
        return "traceback", f"{type(e).__name__}: {e}"
    if any(not torch.equal(value, net.state_dict()[name]) for name, value in before.items()):
        return "silent", "the export changed the module"
    spread = float(truth.std())
    with torch.no_grad():
        graph = run(done.recipe.graph, torch.from_numpy(UNSEEN), float_parameters(done.recipe.graph)).numpy()
    if not np.abs(graph - truth).max() <= 1e-3 * spread:
        return "silent", f"the graph is off by {np.abs(graph - truth).max() / spread:.2g} of the spread"
    target = done.bundle.target()
    engine = infer(session(done.bundle.read(target.model), done.bundle.norms.tensors()), UNSEEN)
    error, same = np.sqrt(np.mean((engine - truth) ** 2)) / spread, (engine.argmax(1) == truth.argmax(1)).mean()
    if error > 0.5 and same < 0.8:
        return "silent", f"the engine is off by {error:.2g} of the spread and agrees on {same:.0%}"
    return "exported", ""


def main(count: int, first: int = 0) -> int:
    found: Counter[str] = Counter()
    why: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            net = random_module(seed)
            kind, reason = outcome(net, Path(folder))
            found[kind] += 1
            if kind == "refused":
                why[reason.split(":")[0]] += 1
            if kind != "exported":
                click.echo(f"{seed}: {kind} {net.said} {reason[:200]}")
    click.echo(f"{ {kind: found[kind] for kind in KINDS} } {dict(why)}")
    return found["silent"] + found["traceback"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*map(int, sys.argv[1:] or [300])))
