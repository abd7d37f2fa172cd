"""From a supernet and budgets to one configuration: measure pairs, teach the predictor, search, measure the finalists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from export.elastic.genome import Genome, genome_of
from export.elastic.judge import Judge
from export.elastic.pairs import Pairs, measured_pairs
from export.elastic.predictor import Predictor, Quality
from export.elastic.search import Budget, Evolution, check_budgets, search, within
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
            if within(budgets, c):
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
    rounds: int = 3,
    evolution: Evolution = DEFAULT,
    forms: Sequence[Form] = (),
    final: Judge | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Choice:
    """Everything is measured on the held-out pictures of `judge`, with norm statistics of its own.

    A search finds where the predictor is too hopeful as surely as where the net is good. So what it finds is measured, and the
    predictor taught, before the next round; only what was measured can be chosen.

    Args:
        pairs: measured before the first round. finalists: measured in each round, and again at the end by `final`.
        final: measures finalists and uniform rivals on more pictures; None: `judge`.

    Raises:
        UsageError: no configuration is within the budgets.
    """
    space, layout = judge.supernet.space, judge.supernet.layout

    check_budgets(space, layout, budgets, forms)  # before anything is measured
    known = measured_pairs(judge, pairs, evolution.seed, pairs_file, lambda done: progress("measuring pairs", done, pairs))
    predictor, quality = Predictor.judged(layout, list(known), list(known.values()), evolution.seed)
    rivals = uniform_rivals(judge, budgets, forms)
    taught, seeds = dict(known), [genome_of(layout, c) for _, c in rivals]
    for number in range(max(rounds, 1)):

        def searching(generation: int, best: float, number: int = number) -> None:
            progress(f"round {number + 1} of {rounds}, {best:.1%}", generation, evolution.generations)

        other = replace(evolution, seed=evolution.seed + 1000 * number)
        found = search(space, layout, predictor, budgets, other, forms, seeds, searching)
        fresh = _apart([g for g in found if g not in taught], finalists)
        for i, genome in enumerate(fresh):
            taught[genome] = judge.accuracy(genome.configuration(space, layout))
            progress("measuring what was found", i + 1, len(fresh))
        predictor.fit(list(taught), list(taught.values()))
        seeds += fresh

    def fits(genome: Genome) -> bool:
        return within(budgets, genome.configuration(space, layout)) and (not forms or genome.form in forms)

    inside = [g for g in taught if fits(g)]
    hope = dict(zip(inside, predictor(inside), strict=True)) if inside else {}
    inside.sort(key=lambda g: -(taught[g] + float(hope[g])))  # what was measured has luck in it, what is predicted has none

    def candidate(name: str, configuration: Configuration) -> Candidate:
        genome = genome_of(layout, configuration)
        accuracy = taught[genome] if final is None and genome in taught else (final or judge).accuracy(configuration)
        costs = tuple(b.cost(configuration) for b in budgets)
        return Candidate(name, configuration, float(predictor([genome])[0]), accuracy, costs)

    rows = [(f"searched {i + 1}", g.configuration(space, layout)) for i, g in enumerate(inside[:finalists])] + rivals
    measured = []
    for i, (name, configuration) in enumerate(rows):
        measured.append(candidate(name, configuration))
        progress("measuring the finalists", i + 1, len(rows))
    cut = len(rows) - len(rivals)
    return Choice(tuple(sorted(measured[:cut], key=lambda c: -c.accuracy)), tuple(measured[cut:]), quality, known)


def _apart(found: Sequence[Genome], count: int, places: int = 3) -> list[Genome]:
    """The first `count` that differ from one another in so many places, filled up with others where there are too few."""
    chosen: list[Genome] = []
    for genome in found:
        if len(chosen) < count and all(_distance(genome, other) >= places for other in chosen):
            chosen.append(genome)
    return chosen + [g for g in found if g not in chosen][: count - len(chosen)]


def _distance(a: Genome, b: Genome) -> int:
    differing = sum(x != y for x, y in zip(a.weight_bits + a.activation_bits, b.weight_bits + b.activation_bits, strict=True))
    return differing + (a.form != b.form)
