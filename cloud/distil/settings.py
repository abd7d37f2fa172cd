"""Numbers of the distiller, each with its unit and its reason (the ablation is in docs/guide/adaptation.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cloud.training.strategies.registry import check
from refold.errors import UsageError

__all__ = ["DistilSettings", "ModifierName", "RecipeName"]

# The names of `cloud.training.strategies.registry`, once more as types: a test compares them.
RecipeName = Literal[
    "refold", "cema-paper", "cema-released", "distillation", "cema", "eata", "cotta", "rmt", "petal", "sar", "roid"
]
ModifierName = Literal["wisdom-of-crowds", "entropy-band", "redundancy", "teachers", "cafa", "teacher-weights", "label-shift"]


class DistilSettings(BaseModel):
    """Settings of `cloud.distil.Distiller`; `[distil]` in cloud.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: RecipeName = Field(default="refold", description="how the student learns: a strategy's name")
    modifiers: tuple[ModifierName, ...] = Field(default=(), description="what combines with it: names of modifiers")
    options: dict[str, float | int] = Field(default_factory=dict, description="settings of the strategy and of the modifiers")
    seed: int = Field(default=0, description="everything random comes from here")
    threads: int = Field(default=1, ge=1, description="torch threads")
    batch: int = Field(default=64, ge=2, description="pictures per forward pass where no recipe says otherwise; bounds memory")

    # When to train
    fresh_samples: int = Field(default=176, ge=1, description="new samples of a domain before it is trained for the first time")
    growth: float = Field(default=1.5, gt=1, description="factor by which a domain's samples grow before it is trained again")
    kept_samples: int = Field(default=4096, ge=32, description="newest samples of a domain kept for training")

    # Statistics
    mix: float = Field(default=1.0, ge=0, le=1, description="how much of the domain's shift the student's statistics follow")
    mixes: tuple[float, ...] = Field(
        default=(0.6, 0.8), description="other shares, taken where the uploads agree better with the teachers under them"
    )
    population: int = Field(
        default=256, ge=8, description="unbiased samples that statistics are measured on, at most; one batch"
    )
    population_least: int = Field(
        default=16, ge=2, description="unbiased samples below which the device's reports are used instead"
    )
    prior_samples: float = Field(default=12.0, ge=0, description="unbiased samples at which half of `teacher_mix` is reached")

    # Teachers
    teacher_mix: float = Field(default=0.4, ge=0, le=1, description="share of the domain's statistics in the teachers' norms")
    flips: bool = Field(default=True, description="each teacher votes on the picture and on its mirror image")
    shifts: int = Field(default=0, ge=0, le=4, description="pixels by which further votes move the picture; 0 is none")

    # Every recipe but CEMA's two
    steps: int = Field(default=70, ge=4, description="gradient steps of one training")
    rate: float = Field(default=2e-3, gt=0, description="refold: largest learning rate of Adam; one cycle")
    group: int = Field(default=48, ge=4, description="pictures per gradient step")
    restyled: float = Field(default=0.6, ge=0, lt=1, description="largest share of restyled calibration pictures in a step")
    held_back: float = Field(
        default=0.25, ge=0, lt=0.9, description="share of the samples on which the length of the learnt step is chosen"
    )
    sharpen: float = Field(default=4.0, gt=0, description="power the teachers' probabilities are raised to")
    trust: float = Field(
        default=4.0, ge=0, description="power of the teachers' confidence that weighs an upload; 0 weighs all alike"
    )
    pull: float = Field(default=0.0, ge=0, description="weight of the squared distance to the last release's gamma and beta")
    refresh: int = Field(default=25, ge=1, description="steps after which statistics are measured again behind the moved norms")

    # CEMA, as specs/cema.md 1.3
    replay: int = Field(default=10_000, ge=96, description="CEMA: uploads kept for replay, first in first out")
    loss_cap: float = Field(
        default=16.0, gt=0, description="CEMA: largest sample weight exp(0.4 ln C - H); exp(0.4 ln 1000) is 15.8"
    )

    @model_validator(mode="after")
    def _go_together(self) -> DistilSettings:
        try:
            check(self.recipe, self.modifiers, self.options)
        except UsageError as e:
            raise ValueError(e.message) from e
        return self

    @classmethod
    def of(cls, values: dict[str, Any]) -> DistilSettings:
        """From a `[distil]` table. Raises UsageError naming the first key that is unknown or out of range."""
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            first = e.errors()[0]
            where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ").rstrip(".")
            raise UsageError(f"[distil] {where}{': ' if where else ''}{what}.") from e
