"""Orders of axes and paddings, as plain functions: what of the graph's shapes TFLite can take as it is."""

from __future__ import annotations

from collections.abc import Sequence

from export.targets.litert_builder import Order, channels_last, plain

__all__ = ["common_order", "is_same", "reshaped_order", "same_pads", "transposed_order", "without_axes"]


def transposed_order(order: Order, axes: Sequence[int]) -> Order:
    """The order of a transposed value in the tensor of its source: nothing moves."""
    return tuple(list(axes).index(axis) for axis in order)


def without_axes(order: Order, gone: Sequence[int]) -> Order:
    """The order that is left when axes of the graph disappear."""
    left = sorted(set(order) - set(gone))
    return tuple(left.index(axis) for axis in order if axis not in gone)


def common_order(orders: Sequence[Order], rank: int) -> Order:
    """The order in which an elementwise operator reads its inputs: channels last where one of them is so, else the first's."""
    full = [order for order in orders if len(order) == rank]
    if channels_last(rank) in full:
        return channels_last(rank)
    return full[0] if full else plain(rank)


def reshaped_order(before: Sequence[int], after: Sequence[int], order: Order) -> Order | None:
    """The order of a reshaped value whose stored elements stay where they are; None where they cannot.

    The two shapes fall into segments of equal size, e.g. (1, 6, 4, 5) → (1, 2, 3, 20) into 1→1, 6→2·3 and 4·5→20. Elements stay
    where the axes of every segment lie side by side, first before last.
    """
    segments = _segments(before, after)
    segment_of = {axis: number for number, (axes, _) in enumerate(segments) for axis in axes}
    stored = [axis for axis in order if before[axis] != 1]
    seen: list[int] = []
    for position, axis in enumerate(stored):
        number = segment_of[axis]
        if position and number == seen[-1]:
            if axis < stored[position - 1]:
                return None
        elif number in seen:
            return None
        else:
            seen.append(number)
    units = [number for number in range(len(segments)) if number not in seen]
    return tuple(axis for number in [*units, *seen] for axis in segments[number][1])


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        p, q = before[i], after[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                left.append(i)
                p, i = p * before[i], i + 1
            else:
                right.append(j)
                q, j = q * after[j], j + 1
        segments.append((left, right))
    rest = (list(range(i, len(before))), list(range(j, len(after))))
    return [*segments, rest] if any(rest) else segments


def same_pads(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """What TensorFlow's SAME pads (before, after) along one axis."""
    reach = (kernel - 1) * dilation + 1
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def is_same(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> bool:
    """Whether pads (top, left, bottom, right) are those of SAME."""
    found = [same_pads(*axis) for axis in zip(sizes, kernel, strides, dilations, strict=True)]
    return [f[0] for f in found] == list(pads[:2]) and [f[1] for f in found] == list(pads[2:])
