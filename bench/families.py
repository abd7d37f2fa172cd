"""A transformer and a net with norms before its convolutions, at the sizes people deploy; own definitions, random weights.

ViT-S/16 (Dosovitskiy et al. 2021, Touvron et al. 2021) has LayerNorms and matrix products that no norm is folded into.
DenseNet-121 (Huang et al. 2017) normalises what several layers wrote, so that its norms stay affine operations of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.models import decide, inputs, sane

__all__ = ["DenseNet121", "ViT", "densenet121", "vit_s"]


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 to four times the growth, norm, ReLU, 3x3 to the growth; appended to what came in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class DenseNet121(nn.Module):
    """Input (N, 3, 224, 224), normalised; output (N, classes) logits. 8.0 million parameters, 121 norms at 1,000 classes."""

    def __init__(self, classes: int = 1000, growth: int = 32) -> None:
        super().__init__()
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, 2, 1))
        for block, count in enumerate((6, 12, 24, 16)):
            layers += [DenseLayer(width + i * growth, growth) for i in range(count)]
            width += count * growth
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            if block < 3:
                layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                width //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(mixed)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """Input (N, 3, 224, 224), normalised; output (N, classes) logits. 22 million parameters, 25 norms at the default size."""

    def __init__(self, classes: int = 1000, width: int = 384, depth: int = 12, heads: int = 6, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, (224 // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.seen(x))
        return logits

    def seen(self, x: Tensor) -> Tensor:
        """What the classifier reads: float32 (N, width)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(x.shape[0], -1, -1), tokens], 1) + self.places
        y: Tensor = self.norm(self.blocks(x))[:, 0]
        return y


def densenet121() -> nn.Module:
    return sane(DenseNet121(), 4, level=True)


def vit_s() -> nn.Module:
    """Weights of the usual initialisation; positions and start token drawn, norms' gains made unequal, a head that decides."""
    generator = torch.Generator().manual_seed(3)
    net = ViT(classes=10)  # few, as fine-tuned ones have: among a thousand, a random head has ties
    for name, parameter in net.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        elif parameter.dim() == 1:
            parameter.data.zero_()
        else:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        decide(net.classifier, torch.cat([net.seen(batch) for batch in inputs(3)]), generator)
    return net.eval()
