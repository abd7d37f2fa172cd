"""Which cloud strategy learns most from the same uploads: every registered one, on the product's own path.

Student: ResNet-20's bundle; teachers: those of the data folder. Of each corruption (CIFAR-10-C, severity 5) 300 images are
uploads, all of them chosen at random; `cloud.distil.Distiller` trains on them as in the service, and the device's int8 engine
answers 1,500 other images of the corruption with the states that come out. Uploads, teachers, statistics, number of steps and
the choice of how far to go are the same for all; strategy, modifiers and learning rate differ.

Two halves that share no corruption and no seed:

    development   gaussian noise, glass blur, frost, JPEG at seed 100: the best row is chosen here; each row's learning rate on
                  gaussian noise and JPEG
    report        shot noise, defocus blur, snow, contrast, pixelate at seed 0

A row with modifiers takes the learning rate of the row it is built on.
"""

from __future__ import annotations

from bench.result import Options, Result
from bench.strategies.pieces import Piece, Work, run_pieces
from bench.strategies.report import best_rate, build, plot
from bench.strategies.rows import ROWS, Scale
from refold.errors import UsageError

__all__ = ["plot", "run"]


def run(options: Options) -> Result:
    """Full: 4 + 5 corruptions. Quick: 1 + 2, fewer steps and images, one learning rate a row."""
    scale = Scale.of(options.quick)
    rows = [r for r in ROWS if options.wants(r.name)]
    rows += [r for r in ROWS if r not in rows and r.name in {x.base for x in rows}]
    if not rows:
        raise UsageError(f"No row is called like {', '.join(options.only)}; there are {', '.join(r.name for r in ROWS)}.")
    rows.sort(key=ROWS.index)
    bases, built = [r for r in rows if not r.base], [r for r in rows if r.base]
    development = [(name, scale.development_seed) for name in scale.development]
    report = [(name, options.seed) for name in scale.report]

    def pieces(work: list[Work], title: str) -> list[Piece]:
        return run_pieces(work, scale, title, processes=options.processes, resume=options.resume)

    tuning = [where for where in development if where[0] in scale.tuning]
    found = pieces([Work(r.name, rate, *where) for where in tuning for r in bases for rate in scale.rates(r)], "learning rates")
    rates = {r.name: best_rate(r.name, found) for r in bases}
    rates |= {r.name: rates[r.base] for r in built}
    chosen = [Work(r.name, rates[r.name], *where) for where in (*development, *report) for r in rows]
    known = {p.work for p in found}
    found += pieces([w for w in chosen if w not in known], "development and report")
    return build(rows, rates, found, scale, seed=options.seed, quick=options.quick)
