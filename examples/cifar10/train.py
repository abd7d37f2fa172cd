"""Trains the demo's networks: a ResNet-56 teacher hardened by AugMix, and an ordinary ResNet-20 student.

    python examples/cifar10/train.py --out demo/weights                                        GPU: from nothing
    python examples/cifar10/train.py --out demo/weights --fine-tune-from "$REFOLD_DATA"        CPU: from published weights

The last 2,000 test pictures measure before and after; nothing is chosen by them. README.md beside this has the results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from augmix import augmix, crop_and_flip
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from demo.images import cifar10
from demo.models import load_npz, resnet20, resnet56, save_npz
from refold.errors import RefoldError

MEAN = (0.485, 0.456, 0.406)  # those of the published weights (ImageNet's), kept so that one preprocessing fits all
STD = (0.229, 0.224, 0.225)
CONSISTENCY = 6.0  # weight of the Jensen-Shannon term; AugMix has 12 for three views
PLATEAU = 0.3  # the rate falls to this share and stays, for the average of weights along the way (Izmailov et al. 2018)
HELD_OUT = slice(8000, 10000)


def normalise(images: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..255, any dtype, to the networks' input."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def teacher_loss(net: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the plain view, Jensen-Shannon consistency with the mixed one; both views share batch statistics."""
    plain = images.float()
    both = net(normalise(torch.cat([plain, augmix(plain, generator)])))
    p, q = both.softmax(1).clamp_min(1e-7).chunk(2)
    middle = ((p + q) / 2).log()
    divergence = ((p * (p.log() - middle)).sum(1) + (q * (q.log() - middle)).sum(1)).mean() / 2
    loss: Tensor = functional.cross_entropy(both.chunk(2)[0], labels) + CONSISTENCY * divergence
    return loss


def student_loss(net: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy alone: the student is what most people ship, so that the demo shows what adaptation adds to it."""
    loss: Tensor = functional.cross_entropy(net(normalise(images)), labels)
    return loss


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent, in evaluation mode."""
    net.eval()
    hits = [
        (net(normalise(x)).argmax(1) == y).sum()
        for x, y in zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
    ]
    return 100 * float(sum(hits)) / len(labels)


def train(name: str, net: nn.Module, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Trains in place: SGD with a falling rate, and the mean of the weights over the last two thirds."""
    images, labels = data
    steps, loss_of = (args.teacher_steps, teacher_loss) if name == "teacher" else (args.student_steps, student_loss)
    batch = args.batch // 2 if name == "teacher" else args.batch  # the teacher sees two views of each picture
    generator = torch.Generator().manual_seed(args.seed)
    decay = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim == 1]
    mean_net = AveragedModel(net)
    groups = [{"params": decay, "weight_decay": 5e-4}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(groups, lr=args.rate, momentum=0.9, nesterov=True)
    order = torch.randperm(len(images), generator=generator)
    began, mean_loss = time.monotonic(), 0.0
    for step in range(steps):
        warm = min(1.0, (step + 1) / min(50, steps))
        for group in optimiser.param_groups:
            group["lr"] = args.rate * warm * max(PLATEAU, (1 + math.cos(math.pi * step / steps)) / 2)
        start = step * batch % (len(images) - batch + 1)
        if step and start < batch:
            order = torch.randperm(len(images), generator=generator)
        index = order[start : start + batch].to(images.device)
        x, y = crop_and_flip(images[index], generator), labels[index]
        net.train()
        loss = loss_of(net, x, y, generator)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if step >= steps // 3:
            mean_net.update_parameters(net)
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        if (step + 1) % 25 == 0 or step + 1 == steps:
            print(f"{name} {step + 1}/{steps} loss {mean_loss:.3f} {time.monotonic() - began:.0f} s", flush=True)
    net.load_state_dict(mean_net.module.state_dict())
    renew_statistics(net, images, order[:5000], generator)


@torch.no_grad()
def renew_statistics(net: nn.Module, images: Tensor, index: Tensor, generator: torch.Generator) -> None:
    """Averaged weights need statistics of their own: cumulative means over plainly augmented training pictures."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    for i in range(0, len(index), 250):
        net(normalise(crop_and_flip(images[index[i : i + 250].to(images.device)], generator)))
    for norm in norms:
        norm.momentum = 0.1
    net.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/weights"))
    parser.add_argument("--fine-tune-from", type=Path, help="folder with resnet20_cifar10.npz and resnet56_augmix_cifar10.npz")
    parser.add_argument("--teacher-steps", type=int, help="default: 78,000 from nothing, 400 when fine-tuning")
    parser.add_argument("--student-steps", type=int, help="default: 78,000 from nothing, 300 when fine-tuning")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, help="peak learning rate; default: 0.1 from nothing, 0.01 when fine-tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tuned = args.fine_tune_from is not None
    args.rate = args.rate or (0.01 if tuned else 0.1)
    args.teacher_steps = args.teacher_steps or (400 if tuned else 78_000)
    args.student_steps = args.student_steps or (300 if tuned else 78_000)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        train_set, test_set = cifar10("train"), cifar10("test")
        teacher, student = resnet56(), resnet20()
        if tuned:
            load_npz(teacher, args.fine_tune_from / "resnet56_augmix_cifar10.npz")
            load_npz(student, args.fine_tune_from / "resnet20_cifar10.npz")
    except RefoldError as e:
        print(e.message, file=sys.stderr)
        return e.exit_code

    def tensors(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device), torch.from_numpy(labels).to(device)

    data, held_out = tensors(*train_set), tensors(test_set[0][HELD_OUT], test_set[1][HELD_OUT])
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"device": str(device), "torch": torch.__version__}
    report["settings"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    for name, net in (("teacher", teacher), ("student", student)):
        net.to(device)
        before = accuracy(net, *held_out)
        train(name, net, data, args)
        after = accuracy(net, *held_out)
        print(f"{name}: {before:.2f} % before, {after:.2f} % after, on 2,000 held-out test pictures", flush=True)
        report[name] = {"before": before, "after": after}
        save_npz(net.cpu(), args.out / f"cifar10_{name}.npz")
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
