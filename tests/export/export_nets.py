"""Small networks of every family export promises, with random weights and norms whose statistics fit the pictures."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from refold.preprocess import Preprocess

SIZE, CLASSES = 16, 5
PREPROCESS = Preprocess(SIZE, SIZE, 1 / 255, (0.5, 0.45, 0.4), (0.25, 0.25, 0.3))


def pictures(count: int = 32, size: int = SIZE, seed: int = 0) -> NDArray[np.uint8]:
    """Blobs and stripes of many colours: uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    waves = rng.uniform(-9, 9, (count, 3, 2))
    phase = rng.uniform(0, 6, (count, 3))
    field = np.sin(waves[..., 0, None, None] * rows + waves[..., 1, None, None] * columns + phase[..., None, None])
    level = rng.uniform(60, 200, (count, 3, 1, 1))
    grain = rng.normal(0, 10, field.shape)
    return np.clip(level + 55 * field + grain, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def settled(net: nn.Module, size: int = SIZE, seed: int = 0) -> nn.Module:
    """Random affine parameters, and running statistics of the pictures: a net that is alive at every layer."""
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.momentum = 1.0
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)) and m.weight is not None:
            with torch.no_grad():
                m.weight.uniform_(0.6, 1.4)
                m.bias.normal_(0, 0.2)
                if m.weight.numel() > 4 and not isinstance(m, nn.LayerNorm):
                    m.weight[1] *= -1  # a negative gamma: its sign goes into the integers
    x = torch.from_numpy(Preprocess(size, size, PREPROCESS.scale, PREPROCESS.mean, PREPROCESS.std).apply(pictures(32, size)))
    with torch.no_grad():
        net.train()(x)
        net.eval()
        spread = net(x).std(0).mean()
        last = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
        last.weight.mul_(2.0 / spread.clamp_min(1e-3))
    return net


class ConvNorm(nn.Sequential):
    def __init__(self, i: int, o: int, k: int = 3, s: int = 1, groups: int = 1, act: nn.Module | None = None) -> None:
        parts = [nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
        super().__init__(*parts, *([act] if act is not None else []))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Residual(nn.Module):
    """A bottleneck with a projection, and a second block with an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 1, act=nn.ReLU())
        self.a, self.b = ConvNorm(8, 8, 1, act=nn.ReLU()), ConvNorm(8, 16, 3, 2)
        self.down = ConvNorm(8, 16, 1, 2)
        self.c, self.d = ConvNorm(16, 16, 3, act=nn.ReLU()), ConvNorm(16, 16, 3)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.b(self.a(x)) + self.down(x))
        return self.head(F.relu(self.d(self.c(x)) + x))


class OptionA(nn.Module):
    """Convolutions with biases, TensorFlow padding, slices and channel padding in the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16, eps=1e-3)
        self.conv3 = nn.Conv2d(16, 16, 3, padding="same")
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = torch.relu(self.bn2(self.conv2(F.pad(x, (0, 1, 0, 1)))) + short)
        return self.head(torch.relu(self.conv3(x)))


class Inverted(nn.Module):
    """MobileNetV2's block: depthwise, ReLU6, linear bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2, act=nn.ReLU6())
        self.up, self.depth = ConvNorm(8, 24, 1, act=nn.ReLU6()), ConvNorm(24, 24, 3, groups=24, act=nn.ReLU6())
        self.down = ConvNorm(24, 8, 1)
        self.last = ConvNorm(8, 32, 1, act=nn.ReLU6())
        self.drop, self.head = nn.Dropout(0.2), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(self.depth(self.up(x)))
        return self.head(self.drop(self.last(x)))


class Vgg(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            ConvNorm(3, 8, act=nn.ReLU(inplace=True)), nn.MaxPool2d(2), ConvNorm(8, 16, act=nn.ReLU(inplace=True)),
            nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32),
            nn.ReLU(), nn.Linear(32, CLASSES),
        )  # fmt: skip


class Dense(nn.Module):
    """DenseNet: norm before convolution, concatenation, average pooling between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.n1, self.c1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1, bias=False)
        self.n3, self.head = nn.BatchNorm2d(24), Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.c1(F.relu(self.n1(x)))], 1)
        x = F.avg_pool2d(torch.cat([x, self.c2(F.relu(self.n2(x)))], 1), 2)
        return self.head(F.relu(self.n3(x)))


class Squeeze(nn.Module):
    """Squeeze-and-excitation with sigmoid, SiLU and hardswish, and a hard sigmoid gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = ConvNorm(3, 16, 3, 2, act=nn.SiLU()), ConvNorm(16, 16, act=nn.Hardswish())
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.hard, self.head = nn.Conv2d(16, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(x * F.hardsigmoid(self.hard(F.adaptive_avg_pool2d(x, 1))))


class ConvNext(nn.Module):
    """Depthwise 7x7, LayerNorm over channels, linear layers, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.depth, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale = nn.Parameter(torch.full((16,), 0.5))
        self.last, self.fc = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        logits: Tensor = self.fc(self.last(x.mean((-2, -1))))
        return logits


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.fused = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, fused

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q @ k.transpose(-2, -1)) * (w // self.heads) ** -0.5).softmax(-1) @ v
        y: Tensor = self.out(x.transpose(1, 2).reshape(b, t, w))
        return y


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, 4)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 24) * 0.2), nn.Parameter(torch.randn(1, 17, 24) * 0.2)
        self.n1, self.a1, self.n2 = nn.LayerNorm(24), Attention(24, 2, True), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.n3, self.a2, self.n4, self.fc = nn.LayerNorm(24), Attention(24, 2, False), nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.a1(self.n1(x))
        x = x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))
        x = x + self.a2(self.n3(x))
        logits: Tensor = self.fc(self.n4(x)[:, 0])
        return logits


class Grouped(nn.Module):
    """GroupNorm, InstanceNorm, RMSNorm; leaky ReLU, ELU, PReLU, tanh; softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16)
        self.c2, self.n2 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.InstanceNorm2d(16, affine=True)
        self.prelu, self.norm, self.fc = nn.PReLU(16), nn.RMSNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.n1(self.c1(x)), 0.1)
        x = F.elu(self.n2(self.c2(x))) + torch.tanh(self.prelu(x))
        return F.softmax(self.fc(self.norm(x.mean((2, 3)))), 1)


class Shuffle(nn.Module):
    """Channel split and shuffle, hardtanh, upsampling, transposed convolution, pixel shuffle, a convolution as classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 16, 3, 2, act=nn.Hardtanh(-2.0, 2.0))
        self.left, self.right = ConvNorm(8, 8, act=nn.ReLU()), ConvNorm(8, 8, 1)
        self.wide = nn.ConvTranspose2d(16, 8, 2, 2, bias=True)
        self.after, self.last = nn.BatchNorm2d(8), nn.Conv2d(14, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = x.chunk(2, 1)
        x = torch.cat([self.left(a), self.right(b)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        big = F.relu(self.after(self.wide(x)))
        up = F.interpolate(x[:, :2], scale_factor=2, mode="nearest")
        x = torch.cat([big, F.pixel_shuffle(x, 2), up[:, 0:1], torch.maximum(up[:, 1:2], up[:, :1] * 0.5)], 1)
        return self.last(x).mean((2, 3))


class Unary(nn.Module):
    """Arithmetic with constants and the functions that have no integer form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x * 0.5 + 0.1))
        y = F.mish(x) + F.softplus(x) - x.clamp(-1.0, 1.0) / 2 + (1.5 - x.abs().sqrt()) * torch.exp(-x.pow(2))
        y = torch.stack([y, x], 1).sum(1) + y.amax((2, 3), keepdim=True) + torch.erf(x) - (-x)
        y = F.interpolate(y, size=(12, 12), mode="bilinear")
        y = y / (y.square().mean((1,), keepdim=True) + 1e-3).sqrt()
        return self.fc(F.adaptive_max_pool2d(y, 1).squeeze(-1).squeeze(-1))


class Decomposed(nn.Module):
    """Operators torch takes apart for us, and a few that move things about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, affine=False), Head(8)
        self.mix = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.register_buffer("index", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = torch.einsum("nchw,cd->ndhw", x, self.mix)
        x = F.selu(x).roll((1, -2), (2, 3)) + F.glu(torch.cat([x, x], 1), 1)
        x = F.normalize(x, dim=1) * (self.index.reshape(1, -1, 1, 1) / 4 + 1)
        x = x.movedim(1, -1).movedim(-1, 1)
        return self.head(x)


NETS: dict[str, type[nn.Module]] = {
    c.__name__.lower(): c
    for c in (Residual, OptionA, Inverted, Vgg, Dense, Squeeze, ConvNext, Vit, Grouped, Shuffle, Unary, Decomposed)
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settled(NETS[name]().eval())


def residual() -> nn.Module:
    """For the command line: `export_nets.py:residual`."""
    return make("residual")
