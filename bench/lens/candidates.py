"""What is added to the student. Every candidate is without effect at the start, and learns beside the norms.

lens        y = W * x + b in front of the network: one 5x5 kernel for each colour channel, identity at the start
            (Refold's issue 12; a linear filter of the input inverts blur and contrast to first order)
low-rank    y = conv(x) + B A x beside every convolution that mixes channels: A (rank, inputs) at random, B (outputs, rank)
            zero at the start, both 1x1 (Hu et al., LoRA, ICLR 2022; beside convolutions: Liu et al., ViDA, ICLR 2024)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cloud.distil import Student
from refold.bundle import Bundle
from refold.norms import NormState

__all__ = ["CANDIDATES", "NORMS", "RANK", "SIDE", "AddedStudent", "Candidate", "Lens", "LowRank", "add_lens", "add_low_rank"]

NORMS = "norms alone"
SIDE, RANK = 5, 2
CONVOLUTION = torch.ops.aten.conv2d.default


class Lens(nn.Module):
    """A linear filter of each channel, float32 (N, channels, H, W) to the same shape; beyond the border is 0.

    Args:
        channels: of the input.
        factor: the kernel is identity + factor · θ, and θ learns. Adam's steps do not depend on a gradient's size, so the
            kernel moves as it would at `factor` times the learning rate.
    """

    def __init__(self, channels: int = 3, factor: float = 1.0) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(channels, 1, SIDE, SIDE))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.identity: Tensor
        self.register_buffer("identity", torch.zeros(channels, 1, SIDE, SIDE))
        self.identity[:, :, SIDE // 2, SIDE // 2] = 1
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        kernel, bias = self.identity + self._factor * self.kernel, self._factor * self.bias
        return nn.functional.conv2d(x, kernel, bias, padding=SIDE // 2, groups=len(kernel))


class LowRank(nn.Module):
    """B A x for float32 (N, inputs, H, W) and a stride: (N, outputs, ⌈H / stride⌉, ⌈W / stride⌉). `factor`: as `Lens`."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: float, generator: torch.Generator) -> None:
        super().__init__()
        self.start: Tensor
        self.register_buffer("start", torch.randn(RANK, inputs, 1, 1, generator=generator) / inputs**0.5)
        self.down = nn.Parameter(torch.zeros(RANK, inputs, 1, 1))
        self.up = nn.Parameter(torch.zeros(outputs, RANK, 1, 1))
        self._stride, self._factor = stride, factor

    def forward(self, x: Tensor) -> Tensor:
        seen = nn.functional.conv2d(x, self.start + self._factor * self.down, stride=self._stride)
        return nn.functional.conv2d(seen, self._factor * self.up)


def add_lens(network: GraphModule, factor: float) -> list[nn.Parameter]:
    """Puts a lens behind the program's input; returns what learns."""
    x = next(n for n in network.graph.nodes if n.op == "placeholder")
    lens = Lens(x.meta["val"].shape[1], factor)
    network.add_submodule("lens", lens)
    with network.graph.inserting_after(x):
        seen = network.graph.call_module("lens", (x,))
    x.replace_all_uses_with(seen, delete_user_cb=lambda user: user.op == "call_function")
    network.recompile()
    return list(lens.parameters())


def add_low_rank(network: GraphModule, factor: float) -> list[nn.Parameter]:
    """Puts a branch beside every convolution with one group; returns what learns."""
    generator = torch.Generator().manual_seed(0)
    found: list[nn.Parameter] = []
    for node in [n for n in network.graph.nodes if n.target is CONVOLUTION]:
        x, weight = node.args[:2]
        stride = node.args[3][0] if len(node.args) > 3 else 1
        if len(node.args) > 6 and node.args[6] != 1:  # groups: channels are not mixed
            continue
        outputs, inputs = weight.meta["val"].shape[:2]
        branch = LowRank(inputs, outputs, stride, factor, generator)
        name = f"branch_{len(found) // 2}"
        network.add_submodule(name, branch)
        with network.graph.inserting_after(node):
            beside = network.graph.call_module(name, (x,))
        with network.graph.inserting_after(beside):
            total = network.graph.call_function(torch.ops.aten.add.Tensor, (node, beside))
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
        found += [branch.down, branch.up]
    network.recompile()
    return found


@dataclass(frozen=True)
class Candidate:
    """Something that could be added. add: to a student's program, at a factor on its learning rate; returns what learns."""

    name: str
    add: Callable[[GraphModule, float], list[nn.Parameter]]


CANDIDATES = (Candidate("lens", add_lens), Candidate("low-rank", add_low_rank))


class AddedStudent(Student):
    """A student with a candidate in it: what was added learns, is gone back on and starts anew together with the norms.

    Args:
        bundle: open.
        candidate: what to add.
        factor: on its learning rate.
    """

    def __init__(self, bundle: Bundle, candidate: Candidate, factor: float) -> None:
        self.added: list[nn.Parameter] = []
        super().__init__(bundle)
        assert isinstance(self._network, GraphModule)
        self.added = candidate.add(self._network, factor)
        for parameter in self.added:
            parameter.requires_grad_(False)

    @property
    def parameters(self) -> list[Tensor]:
        return [*super().parameters, *self.added]

    def exported_values(self) -> list[Tensor]:
        return [*super().exported_values(), *(torch.zeros_like(p) for p in self.added)]

    def load(self, states: Mapping[str, NormState]) -> None:
        """Sets every norm, and what was added back to the start."""
        super().load(states)
        with torch.no_grad():
            for parameter in self.added:
                parameter.zero_()
