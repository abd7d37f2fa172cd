"""From a supernet and budgets to one configuration: measure pairs, teach the predictor, search, measure the finalists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.elastic.genome import genome_of
from export.elastic.judge import Judge
from export.elastic.pairs import Pairs, measured_pairs
from export.elastic.predictor import Predictor, Quality
from export.elastic.search import Budget, Evolution, check_budgets, search
from export.elastic.space import Configuration, Form

__all__ = ["Candidate", "Choice", "choose", "uniform_rivals"]

Progress = Callable[[str, int, int], None]
DEFAULT = Evolution()


@dataclass(frozen=True)
class Candidate:
    """accuracy: measured; predicted: by the predictor; costs: in the order of the budgets."""

    name: str
    configuration: Configuration
    predicted: float
    accuracy: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """finalists: measured, the best first; uniform: the best uniform ones within the budgets, measured too."""

    finalists: tuple[Candidate, ...]
    uniform: tuple[Candidate, ...]
    quality: Quality
    pairs: Pairs

    @property
    def best(self) -> Candidate:
        return max((*self.finalists, *self.uniform), key=lambda c: c.accuracy)


def uniform_rivals(judge: Judge, budgets: Sequence[Budget], forms: Sequence[Form] = ()) -> list[tuple[str, Configuration]]:
    """Uniform configurations within the budgets that no other of them exceeds in both bit-widths; the space's usual form."""
    space, layout = judge.supernet.space, judge.supernet.layout
    form = space.form if not forms or space.form in forms else forms[0]
    fits = []
    for w in space.weight_bits:
        for a in space.activation_bits:
            c = space.uniform(layout, w, a, form)
            if all(b.cost(c) <= b.most for b in budgets):
                fits.append((w, a, c))
    front = [(w, a, c) for w, a, c in fits if not any(x >= w and y >= a and (x, y) != (w, a) for x, y, _ in fits)]
    return [(f"w{w}a{a}", c) for w, a, c in front]


def choose(
    judge: Judge,
    budgets: Sequence[Budget],
    pairs_file: Path,
    *,
    pairs: int = 200,
    finalists: int = 8,
    evolution: Evolution = DEFAULT,
    forms: Sequence[Form] = (),
    progress: Progress = lambda what, done, total: None,
) -> Choice:
    """Everything is measured on the held-out pictures of `judge`, with norm statistics of its own.

    Raises:
        UsageError: no configuration is within the budgets.
    """
    space, layout = judge.supernet.space, judge.supernet.layout

    check_budgets(space, layout, budgets, forms)  # before anything is measured
    known = measured_pairs(judge, pairs, evolution.seed, pairs_file, lambda done: progress("measuring pairs", done, pairs))
    predictor, quality = Predictor.judged(layout, list(known), list(known.values()), evolution.seed)
    rivals, total = uniform_rivals(judge, budgets, forms), evolution.generations
    found = search(
        space,
        layout,
        predictor,
        budgets,
        evolution,
        forms,
        [genome_of(layout, c) for _, c in rivals],
        lambda g, best: progress(f"searching, {best:.1%}", g, total),
    )

    def candidate(name: str, configuration: Configuration) -> Candidate:
        genome = genome_of(layout, configuration)
        accuracy = known[genome] if genome in known else judge.accuracy(configuration)
        costs = tuple(b.cost(configuration) for b in budgets)
        return Candidate(name, configuration, float(predictor([genome])[0]), accuracy, costs)

    count = min(finalists, len(found))
    measured = []
    for i, genome in enumerate(found[:count]):
        measured.append(candidate(f"searched {i + 1}", genome.configuration(space, layout)))
        progress("measuring the finalists", i + 1, count + len(rivals))
    uniform = []
    for name, configuration in rivals:
        uniform.append(candidate(name, configuration))
        progress("measuring the finalists", count + len(uniform), count + len(rivals))
    measured.sort(key=lambda c: -c.accuracy)
    return Choice(tuple(measured), tuple(uniform), quality, known)
