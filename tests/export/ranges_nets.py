"""Small networks in which one scale would have to serve values of very different ranges."""

from __future__ import annotations

import export_nets
import torch
from export_nets import ConvNorm
from torch import Tensor, nn

REACH = 320.0


class Body(nn.Module):
    """Two strided convolutions, and features of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = ConvNorm(3, 8, 3, 2, act=nn.ReLU()), ConvNorm(8, 16, 3, 2, act=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mid(self.stem(x)).mean((2, 3), keepdim=True)
        return y


class Detector(nn.Module):
    """YOLO's head: boxes in pixels and scores in 0 to 1, concatenated, every position a row of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = ConvNorm(3, 8, 3, 2, act=nn.ReLU()), ConvNorm(8, 16, 3, 2, act=nn.ReLU())
        self.box, self.score = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x))
        both = torch.cat([torch.sigmoid(self.box(x)) * REACH, torch.sigmoid(self.score(x))], 1)
        return both.flatten(1)


class Stacked(nn.Module):
    """The same with `stack`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.a, self.b = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return torch.stack([self.a(x) * REACH, torch.sigmoid(self.b(x))], 1).flatten(1)


class OneHead(nn.Module):
    """A convolution makes the output: boxes and logits from one layer, whose output has one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Conv2d(16, 7, 1)
        self.register_buffer("reach", torch.tensor([REACH] * 4 + [1.0] * 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x)).flatten(1)
        return y

    def scale_up(self) -> None:
        """Gives the first four outputs their range."""
        with torch.no_grad():
            self.head.weight.mul_(self.reach.view(-1, 1, 1, 1))
            self.head.bias.mul_(self.reach)


class ReadAgain(nn.Module):
    """The concatenation is read by a convolution whose weights give both branches the same say."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.a, self.b, self.last = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        y: Tensor = self.last(torch.cat([self.a(x) * REACH, torch.sigmoid(self.b(x))], 1)).flatten(1)
        return y

    def scale_up(self) -> None:
        """Outputs 0 to 2 listen to the large branch, 3 and 4 to the small one alone."""
        with torch.no_grad():
            self.last.weight[:3, :4].div_(REACH)
            self.last.weight[:3, 4:].zero_()
            self.last.weight[3:, :4].zero_()


class Sum(nn.Module):
    """An addition in which half of the channels of the large term are zero: the small term is all there is in them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.a, self.b = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        wide = torch.nn.functional.pad(self.a(x) * REACH, (0, 0, 0, 0, 0, 4))
        return (wide + torch.sigmoid(self.b(x))).flatten(1)


class Alike(nn.Module):
    """Inception's: three branches of similar ranges. Nothing is to change here."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2, act=nn.ReLU())
        self.a, self.b, self.c = ConvNorm(8, 8, 1, act=nn.ReLU()), ConvNorm(8, 8, 3, act=nn.ReLU()), nn.MaxPool2d(3, 1, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.fc(torch.cat([self.a(x), self.b(x), self.c(x)], 1).mean((2, 3)))
        return y


def make(name: str) -> nn.Module:
    """One of the above with norms that know the pictures, in evaluation mode."""
    torch.manual_seed(0)
    net: nn.Module = globals()[name]()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.from_numpy(export_nets.PREPROCESS.apply(export_nets.pictures(32))))
    if isinstance(net, (OneHead, ReadAgain)):
        net.scale_up()
    return net.eval()
