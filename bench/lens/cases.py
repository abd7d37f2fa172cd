"""What is trained on: cases, and how large a run is."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CASES", "DECIDING", "FULL", "QUICK", "Case", "Scale"]


@dataclass(frozen=True)
class Case:
    """Uploads of a corruption and who labels them.

    Attributes:
        labels: the true labels instead of the teachers' predictions: a bound.
        restyled: whether restyled calibration images are learnt from as well, as in the product.
    """

    name: str
    uploads: int
    labels: bool = False
    restyled: bool = True


DECIDING = (Case("teachers, 300", 300), Case("teachers, 1000", 1000))  # as the product learns
CASES = (
    *DECIDING,
    Case("teachers, 1000, not restyled", 1000, restyled=False),
    Case("labels, 1000, not restyled", 1000, labels=True, restyled=False),
)


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
        report, seeds: corruptions and how many seeds of each.
        development, development_seed: where learning rates are chosen.
        uploads: the most that any case takes; smaller cases take the last of them.
        judged: images not uploaded.
        rates: of the candidates, tried on the development corruptions.
        distil: settings of the distiller that differ from the product's.
    """

    report: tuple[str, ...]
    development: tuple[str, ...]
    seeds: int
    cases: tuple[Case, ...]
    uploads: int
    judged: int
    rates: tuple[float, ...]
    distil: dict[str, object] = field(hash=False)
    development_seed: int = 100

    @classmethod
    def of(cls, quick: bool) -> Scale:
        return QUICK if quick else FULL


# The product's 70 steps; batches of 24 (48) and statistics of 96 images (256) at the default share, to end within the hour.
FULL = Scale(
    ("gaussian_noise", "pixelate", "jpeg_compression", "contrast"),
    ("glass_blur", "frost"),
    seeds=3,
    cases=CASES,
    uploads=1000,
    judged=1500,
    rates=(2e-3, 6e-3, 2e-2),
    distil={"group": 24, "population": 96, "mixes": ()},
)
QUICK = Scale(
    ("pixelate",),
    ("glass_blur",),
    seeds=1,
    cases=DECIDING[:1],
    uploads=300,
    judged=300,
    rates=(6e-3,),
    distil={"group": 16, "population": 64, "mixes": (), "steps": 12, "refresh": 8},
)
