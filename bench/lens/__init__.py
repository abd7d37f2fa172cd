"""Whether a release should carry more than norms: a linear filter in front of the network, or low-rank branches beside its
convolutions.

Student: ResNet-20's bundle, fake-quantised; teachers: those of the data folder. `cloud.distil.Distiller` trains on uploads of a
corruption (severity 5) as in the service, once with the norms alone and once with a candidate beside them: the same uploads,
the same seed, the same batches, the same choice of how far to go. The student then answers 1,500 other images.

    candidates      what is added, and the student that has it
    compute         multiply-adds of each, on ResNet-20 and on EfficientNet-Lite0
    cases, pieces   what is trained on, and one training
    report          table, claims, picture

A candidate's learning rate is chosen on glass blur and frost at seed 100; gaussian noise, pixelate, JPEG and contrast are
reported at three other seeds. Teachers' predictions, with restyled images, decide; the first candidate is also run without
restyled images and on true labels.
"""

from __future__ import annotations

from bench.lens.candidates import CANDIDATES, NORMS
from bench.lens.cases import DECIDING, Scale
from bench.lens.pieces import Piece, Work, run_pieces
from bench.lens.report import best_rate, build, plot
from bench.result import Options, Result
from refold.errors import UsageError

__all__ = ["plot", "run"]


def run(options: Options) -> Result:
    """Full: 4 corruptions, 3 seeds, four cases. Quick: 1 corruption, 1 seed, the smaller deciding case, fewer steps."""
    scale = Scale.of(options.quick)
    chosen = [c for c in CANDIDATES if options.wants(c.name)]
    if not chosen:
        raise UsageError(
            f"No candidate is called like {', '.join(options.only)}; there are {', '.join(c.name for c in CANDIDATES)}."
        )
    seeds = [options.seed + i for i in range(scale.seeds)]

    def pieces(work: list[Work], title: str) -> list[Piece]:
        return run_pieces(work, scale, title, processes=options.processes, resume=options.resume)

    found: list[Piece] = []
    rates = {NORMS: 0.0}
    for candidate in chosen:
        rows = [NORMS, candidate.name] if candidate is chosen[0] else [candidate.name]
        found += pieces(
            [
                Work(name, rate, where, scale.development_seed, DECIDING[0].name)
                for where in scale.development
                for name in rows
                for rate in ((0.0,) if name == NORMS else scale.rates)
            ],
            f"{candidate.name}: learning rate",
        )
        rates[candidate.name] = best_rate(candidate.name, found)
        deciding = [c.name for c in scale.cases if c in DECIDING]
        found += pieces(_work(rows, rates, scale, seeds, deciding), f"{candidate.name}: report")
    bounds = [c.name for c in scale.cases if c not in DECIDING]
    found += pieces(_work([NORMS, chosen[0].name], rates, scale, seeds, bounds), "bounds")
    return build(chosen, rates, found, scale, seeds=seeds, quick=options.quick)


def _work(rows: list[str], rates: dict[str, float], scale: Scale, seeds: list[int], cases: list[str]) -> list[Work]:
    """Seed by seed, so that what an interrupted run has done says something."""
    return [
        Work(name, rates[name], where, seed, case)
        for seed in seeds
        for where in scale.report
        for case in cases
        for name in rows
    ]
