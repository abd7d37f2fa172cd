"""The rows: every strategy of the registry, combinations with modifiers, and what the domain's statistics are worth alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from cloud.distil import DistilSettings

__all__ = ["ROWS", "STATISTICS", "Row", "Scale"]

STATISTICS = "statistics"  # no recipe: the exported gamma and beta behind the measured statistics
FIXED = ("cema-paper",)  # rates are constants of the published configuration


@dataclass(frozen=True)
class Row:
    """One strategy as the benchmark runs it.

    Attributes:
        recipe, modifiers, options: as in `[distil]`.
        base: the row whose learning rate it takes; "": it has a choice of its own.
    """

    name: str
    recipe: str
    modifiers: tuple[str, ...] = ()
    options: dict[str, float] = field(default_factory=dict, hash=False)
    base: str = ""

    def settings(self, rate: float, scale: Scale) -> DistilSettings:
        """The distiller's settings for it; a rate of 0 is the recipe's own."""
        chosen: dict[str, object] = {"recipe": self.recipe, "modifiers": self.modifiers, **scale.distil}
        options = dict(self.options)
        if self.recipe == "refold" and rate:
            chosen["rate"] = rate
        elif rate:
            options["rate"] = rate
        return DistilSettings.of({**chosen, "options": options})


ROWS = (
    Row(STATISTICS, STATISTICS),
    Row("refold", "refold"),
    Row("cema-paper", "cema-paper"),
    Row("distillation", "distillation"),
    Row("cema", "cema"),
    Row("eata", "eata"),
    Row("cotta", "cotta", options={"views": 4}),  # the paper's 32 would take the whole benchmark's time
    Row("rmt", "rmt"),
    Row("petal", "petal"),
    Row("sar", "sar"),
    Row("roid", "roid"),
    Row("cema + entropy band", "cema", ("entropy-band",), base="cema"),
    Row("cema + redundancy", "cema", ("redundancy",), base="cema"),
    Row("eata + teachers", "eata", ("teachers",), base="eata"),
    Row("roid + teachers", "roid", ("teachers",), base="roid"),
    Row("distillation + crowds", "distillation", ("wisdom-of-crowds",), base="distillation"),
    Row("distillation + cafa", "distillation", ("cafa",), base="distillation"),
    Row("distillation + label shift", "distillation", ("label-shift",), base="distillation"),
    Row("distillation + teacher weights", "distillation", ("teacher-weights",), base="distillation"),
)


@dataclass(frozen=True)
class Scale:
    """How much is run. `distil`: settings of the distiller that all rows share. `tuning`: those of the development half on
    which learning rates are tried."""

    tuning: tuple[str, ...]
    development: tuple[str, ...]
    report: tuple[str, ...]
    uploads: int
    judged: int
    tried: tuple[float, ...]
    distil: dict[str, object] = field(hash=False)
    development_seed: int = 100

    @classmethod
    def of(cls, quick: bool) -> Scale:
        return QUICK if quick else FULL

    def rates(self, row: Row) -> tuple[float, ...]:
        """Learning rates that are tried."""
        return (0.0,) if row.recipe in (STATISTICS, *FIXED) else self.tried


# `mixes`: the statistics' share stays at its default, so that rows differ in nothing but what they learn.
FULL = Scale(
    ("gaussian_noise", "jpeg_compression"),
    ("gaussian_noise", "glass_blur", "frost", "jpeg_compression"),
    ("shot_noise", "defocus_blur", "snow", "contrast", "pixelate"),
    uploads=300,
    judged=1500,
    tried=(1e-3, 3e-3),
    distil={"steps": 24, "group": 32, "population": 96, "mixes": (), "refresh": 12},
)
QUICK = Scale(
    ("gaussian_noise",),
    ("gaussian_noise",),
    ("shot_noise", "contrast"),
    uploads=150,
    judged=500,
    tried=(1e-3,),
    distil={"steps": 16, "group": 32, "population": 96, "mixes": (), "refresh": 8},
)
