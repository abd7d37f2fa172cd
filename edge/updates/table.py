"""The state machine of a device's releases, as a table. The updater runs it row by row, and its tests are generated from it.

Each event is a line of steps. `stored` says what is in force after the step is done, should the process die there or the next
step fail: the set of before the event, or the one after it. Only "committed" changes that, and it is one SQLite commit: what is
served and reported in a running process follows at "served", which only assigns; what is staged before is dropped when a step
fails.

    event      steps (| is the commit)
    INSTALL    verified written staged canary canaried applying applied | committed served pruned
    EXPORTED                                                    applied | committed served pruned
    REVERT                                                      applied | committed served pruned
    START                                              counted  applied | committed served pruned
    RECALL     proposed built tried served              another domain is there: nothing of this is stored
    OVERLAY    proposed built tried served              statistics of the device's own, on top of the release in force
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["DURABLE", "STEPS", "TABLE", "TRANSITIONS", "Event", "Row", "Stored", "UpdateState"]


class UpdateState(Enum):
    """The phase of an installation, as it is written into the state file before the phase begins."""

    IDLE = "idle"
    STAGED = "staged"
    CANARY = "canary"
    APPLYING = "applying"


TRANSITIONS: Mapping[UpdateState, frozenset[UpdateState]] = {
    UpdateState.IDLE: frozenset({UpdateState.STAGED}),
    UpdateState.STAGED: frozenset({UpdateState.CANARY, UpdateState.IDLE}),
    UpdateState.CANARY: frozenset({UpdateState.APPLYING, UpdateState.IDLE}),
    UpdateState.APPLYING: frozenset({UpdateState.IDLE}),
}


class Event(Enum):
    INSTALL = "install"  # a release that the cloud orders, older ones included, or that is offered
    EXPORTED = "exported"  # the cloud orders the exported state
    REVERT = "revert"  # the device itself takes its current release back
    START = "start"
    RECALL = "recall"  # the shift detector finds a known domain
    OVERLAY = "overlay"  # evidence of the present domain has grown


class Stored(Enum):
    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        step: its name; `at` is called with it when the step is done.
        stored: what is in force once it is done.
        phase: written durably at this step.
        blames: an error here is the release's own fault, unless its kind may pass (full disk, want of memory).
        survives: a disk that cannot be written does not end the event here: the next start, or the next event, makes up for it.
    """

    step: str
    stored: Stored = Stored.BEFORE
    phase: UpdateState | None = None
    blames: bool = False
    survives: bool = False


_SERVED = (Row("served", Stored.AFTER), Row("pruned", Stored.AFTER, survives=True))
_END = (Row("committed", Stored.AFTER, UpdateState.IDLE), *_SERVED)
_LOCAL = (Row("proposed"), Row("built"), Row("tried"), Row("served"))

TABLE: Mapping[Event, tuple[Row, ...]] = {
    Event.INSTALL: (
        Row("verified"),
        Row("written"),
        Row("staged", phase=UpdateState.STAGED),
        Row("canary", phase=UpdateState.CANARY, blames=True),
        Row("canaried", blames=True),
        Row("applying", phase=UpdateState.APPLYING, blames=True),
        Row("applied", blames=True),
        *_END,
    ),
    Event.EXPORTED: (Row("applied"), *_END),
    Event.REVERT: (Row("applied"), *_END),
    Event.START: (
        Row("counted", survives=True),
        Row("applied", blames=True),
        Row("committed", Stored.AFTER, UpdateState.IDLE, survives=True),
        *_SERVED,
    ),
    Event.RECALL: _LOCAL,
    Event.OVERLAY: _LOCAL,
}
STEPS = tuple(row.step for row in TABLE[Event.INSTALL] if row.step != "served")  # "served" assigns: it takes no time
DURABLE = frozenset(row.step for row in TABLE[Event.INSTALL] if row.stored is Stored.AFTER)
