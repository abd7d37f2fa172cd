"""First steps and zero points: the clipping ratio, of 80 between 1.00 and 0.21, with the least L_2.4 error (EQ-Net's code).

The published search has only five ratios for symmetric steps per channel; here every form gets all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export.elastic.rounding import Codes, integer_codes

__all__ = ["EPS", "RATIOS", "subsample", "zero_anchored"]

RATIOS = tuple(1 - 0.01 * i for i in range(80))
POWER = 2.4
AT_ONCE = 2**19  # numbers looked at together
EPS = 1e-8  # the least step there is


def subsample(x: Tensor, most: int) -> Tensor:
    """At most `most` columns of x (rows, n), evenly spread, and each row's extremes, which the ratios start from."""
    if x.shape[1] <= most:
        return x
    index = torch.linspace(0, x.shape[1] - 1, most).long()
    return torch.cat([x[:, index], x.amin(1, keepdim=True), x.amax(1, keepdim=True)], 1)


def zero_anchored(x: Tensor, codes: Codes, zero: int | None) -> tuple[Tensor, Tensor]:
    """The best step and zero point of each row.

    Args:
        x: float32 (rows, n).
        zero: a fixed zero point; None: to be found.

    Returns:
        steps and zero points, float32 (rows,); zero points are whole and among the codes, so that 0 is represented exactly.
    """
    low, high = x.amin(1).clamp_max(0), x.amax(1).clamp_min(0)
    best = torch.full_like(low, torch.inf)
    steps, zeros = torch.full_like(low, EPS), torch.zeros_like(low) if zero is None else torch.full_like(low, float(zero))
    for ratios in torch.split(torch.tensor(RATIOS), max(1, AT_ONCE // x.numel())):
        s, z = _candidate(low * ratios[:, None], high * ratios[:, None], codes, zero)  # (ratios, rows)
        got = integer_codes(x, s[..., None], z[..., None], codes).mul_(s[..., None])
        error, which = got.sub_(x).abs_().pow_(POWER).mean(2).min(0)
        better = error < best
        best = torch.where(better, error, best)
        steps = torch.where(better, s.gather(0, which[None])[0], steps)
        zeros = torch.where(better, z.gather(0, which[None])[0], zeros)
    return steps, zeros


def _candidate(low: Tensor, high: Tensor, codes: Codes, zero: int | None) -> tuple[Tensor, Tensor]:
    if zero is not None:
        above, below = codes.high - zero, zero - codes.low
        s = torch.maximum(high / above if above else high * 0, -low / below if below else low * 0)
        return s.clamp_min(EPS), torch.full_like(low, float(zero))
    # Where a zero point near an end would push q - z beyond its reach (8-bit weights of one sign), the step grows instead.
    s = torch.maximum((high - low) / (codes.high - codes.low), torch.maximum(high, -low) / codes.reach).clamp_min(EPS)
    return s, (codes.low - torch.round(low / s)).clamp(codes.low, codes.high)
