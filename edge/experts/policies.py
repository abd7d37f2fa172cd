"""Which record is worth least: small classes over arrays, one number per expert, higher is kept.

An expert's number is position * experts + expert, where position counts the layers that have experts. `distance[p, q]` is how
many layers run from a request of layer p until layer q asks again, 1 to S; encoder layers, which run once per request, lie 2 S
away.

    value            decayed frequency, recency and layer distance, weighted as by HOBBIT (arXiv 2411.01433): the default
    learnt           the same signals in a logistic regression that learns while the model runs: nothing to tune
    lru, lfu         of all uses so far
    edgemoe          frequency / distance (arXiv 2308.14352, as its prose has it: soon needed and often used stays)
    edgemoe-printed  its formula as printed, whose divisor runs the wrong way round
    distance         the layer that has just run leaves first; the least recently used of it
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from refold.errors import UsageError

__all__ = ["POLICIES", "Layout", "Policy", "Value", "ValueWeights", "kept_weights", "make_policy", "weights_file"]

log = logging.getLogger(__name__)

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The numbers of a model's experts. layers: as in Geometry, encoder layers negative."""

    layers: tuple[int, ...]
    experts: int

    @property
    def count(self) -> int:
        return len(self.layers) * self.experts

    @property
    def decoder(self) -> int:
        """Layers that run for every token."""
        return sum(layer >= 0 for layer in self.layers)

    def distance(self) -> F64:
        """float64 (positions, positions)."""
        encoder, cycle = len(self.layers) - self.decoder, max(self.decoder, 1)
        out = np.full((len(self.layers), len(self.layers)), 2.0 * cycle)
        for p in range(len(self.layers)):
            for q in range(len(self.layers)):
                if q >= encoder:
                    out[p, q] = ((q - p) % cycle or cycle) if p >= encoder else q - p
                elif q > p:
                    out[p, q] = q - p
        return out


class Policy:
    """Base of all: it remembers when each expert was last used and how often.

    Args:
        frequency: float64 (count,), share of tokens that used the expert on the calibration text; zeros where unknown.
    """

    name: ClassVar[str] = ""

    def __init__(self, layout: Layout, frequency: F64) -> None:
        self.layout = layout
        self.frequency = frequency
        self.distance = layout.distance()
        self._away: list[F64] = [np.repeat(row, layout.experts) for row in self.distance]
        self.last: I64 = np.full(layout.count, -1, np.int64)
        self.clock = 0

    def used(self, ids: I64) -> None:
        """A layer asked for these, whether they were there or not."""
        self.clock += 1
        self.last[ids] = self.clock

    def token(self) -> None:
        """A token has ended."""

    def worth(self, position: int) -> F64:
        """float64 (count,) while the layer at `position` runs; the lowest leaves first."""
        raise NotImplementedError

    def _far(self, position: int) -> F64:
        return self._away[position]


class Lru(Policy):
    name = "lru"

    def worth(self, position: int) -> F64:
        return self.last.astype(np.float64)


class Lfu(Policy):
    """Ties go to the more recent."""

    name = "lfu"

    def __init__(self, layout: Layout, frequency: F64) -> None:
        super().__init__(layout, frequency)
        self.uses: F64 = np.zeros(layout.count)

    def used(self, ids: I64) -> None:
        super().used(ids)
        self.uses[ids] += 1

    def worth(self, position: int) -> F64:
        return self.uses + self.last / (self.clock + 2.0)


class EdgeMoe(Policy):
    """Frequency is the calibration's, and the run's own where there was none (EdgeMoE profiles offline); 0 for encoder
    layers."""

    name = "edgemoe"

    def __init__(self, layout: Layout, frequency: F64) -> None:
        super().__init__(layout, frequency)
        self.uses: F64 = np.zeros(layout.count)
        self._decoder = np.repeat(np.array(layout.layers) >= 0, layout.experts)

    def used(self, ids: I64) -> None:
        super().used(ids)
        self.uses[ids] += 1

    def _often(self) -> F64:
        often = self.frequency if self.frequency.any() else self.uses / (self.clock + 1.0)
        return np.where(self._decoder, often, 0.0)

    def worth(self, position: int) -> F64:
        return self._often() / self._far(position)


class EdgeMoePrinted(EdgeMoe):
    """L = -f / ((S - i + I) mod S), evict arg max; its own layer, where the printed divisor is 0, counts as S."""

    name = "edgemoe-printed"

    def worth(self, position: int) -> F64:
        cycle = max(self.layout.decoder, 1)
        backwards = np.mod(cycle - self._far(position), cycle)
        return self._often() / np.where(backwards == 0, cycle, backwards)


class Distance(Policy):
    name = "distance"

    def worth(self, position: int) -> F64:
        return -self._far(position) + self.last / (self.clock + 2.0)


@dataclass(frozen=True)
class ValueWeights:
    """Of `value`. Each term lies between 0 and 1, so weights compare.

    Attributes:
        frequency: of the decayed share of tokens that used the expert, against the layer's fair share.
        recency: of how lately it was used. distance: of how soon its layer runs.
        memory: tokens after which a use counts half in the frequency. fade: tokens after which recency is half.
    """

    frequency: float = 1.0
    recency: float = 0.3
    distance: float = 0.1
    memory: float = 128.0
    fade: float = 4.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
                raise UsageError(f"{field.name} of the policy `value` is a number from 0, not {value!r}.")
        if min(self.memory, self.fade) <= 0:
            raise UsageError("memory and fade of the policy `value` are tokens, above 0.")


class Value(Policy):
    """p = w_f F + w_r R + w_d (1 - d / S): F decayed frequency, R = 2^(-tokens since / fade)."""

    name = "value"

    def __init__(self, layout: Layout, frequency: F64, weights: ValueWeights | None = None) -> None:
        super().__init__(layout, frequency)
        self.weights = weights or ValueWeights()
        self._keep = 0.5 ** (1 / self.weights.memory)
        self._share = frequency.copy()
        self._tokens = 0
        self._when: F64 = np.full(layout.count, -1e9)
        self._soon = 1 - self.distance / max(layout.decoder, 1)

    def used(self, ids: I64) -> None:
        super().used(ids)
        self._share[ids] += 1 - self._keep
        self._when[ids] = self._tokens

    def token(self) -> None:
        self._tokens += 1
        self._share *= self._keep

    def worth(self, position: int) -> F64:
        w = self.weights
        recency = np.exp2((self._when - self._tokens) / w.fade)
        soon = np.repeat(self._soon[position], self.layout.experts)
        return np.asarray(w.frequency * self._share + w.recency * recency + w.distance * soon, np.float64)


class Learnt(Policy):
    """Expected layers until the next use, d + S (1 - p) / p, where p is how likely a token uses the expert.

    p is a logistic regression on shares of use that decay over 1 to 200 tokens and the logarithms of the slowest two, one for
    all experts, learnt online (Adagrad) from each request of a layer: who was used, and who was not.
    """

    name = "learnt"
    HALF = np.array([[1.0], [3.0], [10.0], [40.0], [200.0]])
    START = np.array([-2.5, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0, 0.0])
    RATE = 0.2

    def __init__(self, layout: Layout, frequency: F64) -> None:
        super().__init__(layout, frequency)
        self._keep = 0.5 ** (1 / self.HALF)
        self._share: F64 = np.zeros((len(self.HALF), layout.count))
        self._share[-2:] = frequency
        self.weights = self.START.copy()
        self._slopes = np.ones(len(self.START))

    def _chance(self, part: slice) -> tuple[F64, F64]:
        share = self._share[:, part]
        signals = np.vstack([np.ones((1, share.shape[1])), share, np.log(share[-2:] + 0.02) + 2])
        return 1 / (1 + np.exp(-np.clip(self.weights @ signals, -20, 20))), signals

    def used(self, ids: I64) -> None:
        super().used(ids)
        n = self.layout.experts
        start = int(ids[0]) // n * n if len(ids) else 0
        part = slice(start, start + n)
        chance, signals = self._chance(part)
        chance[ids - start] -= 1
        slope = signals @ chance * (8 / n)
        self._slopes += slope * slope
        self.weights -= self.RATE * slope / np.sqrt(self._slopes)
        share = self._share[:, part]
        share *= self._keep
        share[:, ids - start] += 1 - self._keep

    def worth(self, position: int) -> F64:
        chance, _ = self._chance(slice(None))
        return np.asarray(-self._far(position) - max(self.layout.decoder, 1) * (1 / chance - 1), np.float64)


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Value, Learnt, Lru, Lfu, EdgeMoe, EdgeMoePrinted, Distance)}


def weights_file(bundle: Path) -> Path:
    """Where weights tuned for a bundle are kept."""
    return bundle.with_name(bundle.name + ".policy.json")


def kept_weights(bundle: Path) -> ValueWeights | None:
    """Weights that `refold edge experts replay --tune --keep` left beside a bundle; None where it did not, or not whole."""
    try:
        told = json.loads(weights_file(bundle).read_text(encoding="utf-8"))
        return ValueWeights(**told)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, UsageError) as e:
        log.warning("The policy weights %s cannot be used (%s): the usual ones are.", weights_file(bundle), e)
        return None


def make_policy(
    name: str, layout: Layout, frequency: F64 | None = None, weights: ValueWeights | Mapping[str, float] | None = None
) -> Policy:
    """Makes a policy by name. `weights` are `value`'s.

    Raises:
        UsageError: unknown policy or weight, or a weight out of range.
    """
    known: F64 = np.zeros(layout.count) if frequency is None else frequency
    if name not in POLICIES:
        raise UsageError(f"There is no cache policy {name!r}; choose one of: {', '.join(POLICIES)}.")
    if name != "value":
        return POLICIES[name](layout, known)
    if isinstance(weights, Mapping):
        names = [f.name for f in dataclasses.fields(ValueWeights)]
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise UsageError(f"The policy `value` has no weight {unknown[0]!r}; it has: {', '.join(names)}.")
        weights = ValueWeights(**weights)
    return Value(layout, known, weights)
