"""Bundles with a float student for the distiller's tests: any torch network, its batch norms named as the contract says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from refold.bundle import Bundle, write_bundle
from refold.codec import table_to_pb
from refold.norms import NormKind, NormSite, NormState, NormTable
from refold.preprocess import Preprocess
from refold.v1 import manifest_pb2 as pb


class Norm(nn.Module):
    """A batch norm whose four vectors have the student's names."""

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        self.gamma = nn.Parameter(source.weight.detach().clone())
        self.beta = nn.Parameter(source.bias.detach().clone())
        self.register_buffer("mean", source.running_mean.detach().clone())
        self.register_buffer("variance", source.running_var.detach().clone())
        self.epsilon = source.eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, self.gamma, self.beta, False, 0.1, self.epsilon)


class SmallNet(nn.Module):
    """Three convolutions, each with its norm; input (N, 3, 16, 16)."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.head(x.mean((2, 3)))


def student_program(network: nn.Module, side: int) -> tuple[bytes, NormTable]:
    """An exported program with norms.<site>.{gamma,beta,mean,variance}, and its norm table."""
    traced = fx.symbolic_trace(network.eval())
    traced.add_submodule("norms", nn.ModuleDict())
    sites = []
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(bn := traced.get_submodule(node.target), nn.BatchNorm2d):
            norm = Norm(bn)
            traced.add_submodule(f"norms.{node.target.replace('.', '__')}", norm)
            state = NormState(*(getattr(norm, n).detach().numpy() for n in ("gamma", "beta", "mean", "variance")))
            sites.append(NormSite(name=node.target, kind=NormKind.BATCH, exported=state, epsilon=bn.eps))
            node.target = f"norms.{node.target.replace('.', '__')}"
    traced.delete_all_unused_submodules()
    traced.recompile()
    for p in traced.parameters():
        p.requires_grad_(False)
    program = torch.export.export(
        traced, (torch.zeros(2, 3, side, side),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},)
    )
    out = io.BytesIO()
    torch.export.save(program, out)
    return out.getvalue(), NormTable(tuple(sites))


def bundle_of(
    network: nn.Module, path: Path, preprocess: Preprocess, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int
) -> Bundle:
    program, table = student_program(network, preprocess.height)
    calibration = io.BytesIO()
    np.savez(calibration, images=images, labels=labels)
    manifest = pb.Manifest(
        name="test",
        class_count=classes,
        preprocess=preprocess.to_pb(),
        norms=table_to_pb(table),
        student="student.pt2",
        calibration="calibration.npz",
    )
    return write_bundle(path, manifest, {"student.pt2": program, "calibration.npz": calibration.getvalue()})
