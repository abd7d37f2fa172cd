"""Trains a small network on scikit-learn's digits in seconds: what the demo runs on where CIFAR-10 cannot be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from demo.models import MODELS, save_npz

__all__ = ["train_digits"]

BATCH = 50
PEAK_RATE = 0.1


def train_digits(
    name: str, data: tuple[NDArray[np.uint8], NDArray[np.int64]], path: Path, *, epochs: int, seed: int, threads: int = 1
) -> None:
    """Trains `demo.models`' network of that name with small shifts as augmentation, and saves it as `.npz`.

    Args:
        data: images uint8 (N, 32, 32, 3) and labels (N,).
    """
    from demo.assets import MEAN, STD

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    images = (torch.from_numpy(data[0]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    labels = torch.from_numpy(data[1])
    net = MODELS[name]().train()
    optimiser = torch.optim.SGD(net.parameters(), lr=PEAK_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(len(images))[: batches * BATCH].split(BATCH):  # type: ignore[no-untyped-call]
            dy, dx = torch.randint(-3, 4, (2,)).tolist()
            logits = net(torch.roll(images[index], (dy, dx), (2, 3)))
            optimiser.zero_grad()
            torch.autograd.backward(functional.cross_entropy(logits, labels[index]))
            optimiser.step()
            schedule.step()
    save_npz(net.eval(), path)
