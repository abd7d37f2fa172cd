"""Every state × everything that can happen × every step of it × every way to fail: served = reported = stored, before and
after a restart. Generated from `edge.updates.table.TABLE`; what is in force after a death is what the table's row says.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from machine_world import (
    FAULTS,
    HAPPENINGS,
    PASSING,
    STATES,
    Happening,
    Killed,
    State,
    World,
    copy,
    make_bundle,
    name_of,
    quietly,
)

from edge.adapt.adapter import RETRY_FRAMES
from edge.updates.table import TABLE, Event, Row, Stored

LOCAL = (Event.RECALL, Event.OVERLAY)
MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def room():
    """A directory in memory where there is one: every commit is synced, and there are tens of thousands."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def model(room):
    return make_bundle(room)


@pytest.fixture(scope="module")
def snapshots(room, model):
    made = {}
    for i, (name, state) in enumerate(STATES.items()):
        made[name] = room / f"snapshot-{i}"
        made[name].mkdir()
        world = World(made[name], model).boot()
        state.build(world)
        assert world.versions == state.now
        world.close()
    return made


def ways(happening: Happening):
    """(row, fault, when): no failure, then every step failing in every way, and a death right after it."""
    yield None, "", ""
    for row, fault in itertools.product(TABLE[happening.event], FAULTS):
        inside = happening.event not in LOCAL or row.step in ("built", "tried")  # the others are a value and a pointer
        if inside:
            yield row, fault, "in"
        if fault == "a kill":
            yield row, fault, "after"


CASES = [
    pytest.param(state, name, row, fault, when, id=f"{state} | {name} | {fault} {when} {row.step if row else ''}")
    for (state, here), (name, happening) in itertools.product(STATES.items(), HAPPENINGS.items())
    if happening.fits(here)
    for row, fault, when in ways(happening)
]


def quick_ones():
    """Everything that goes well, and three ways to fail in each step of each happening, in changing states."""
    groups: dict[object, list] = {}
    for case in CASES:
        state, name, row, _, _ = case.values
        groups.setdefault((name, row.step) if row else (name, state, None), []).append(case)
    for i, group in enumerate(groups.values()):
        yield from {(7 * i + k * len(group) // 3) % len(group): group for k in range(3)}.items()


SOME = [group[i] for i, group in quick_ones()]


def arm(world: World, event: Event, row: Row, fault: str, when: str) -> None:
    def fail(*_: object) -> None:
        raise FAULTS[fault]()

    def stop(step: str) -> None:
        if step.removeprefix("start: ") == row.step:
            fail()

    if event not in LOCAL and when == "in":
        world.updater._do[row.step] = fail
    elif when == "in":
        setattr(world.factory, {"built": "fails", "tried": "canary_fails"}[row.step], fail)
    else:
        world.step = world.local_step = stop


def disarm(world: World) -> None:
    world.step = world.local_step = lambda step: None
    world.factory.fails = world.factory.canary_fails = lambda serving: None
    world.updater._do = world.updater._steps()


def reborn(world: World) -> World:
    """The process is gone, its files are left."""
    world.updater._database.close()
    return World(world.folder, world.bundle, world.ring).boot()


def decides_the_same_again(world: World, room: Path, state: State) -> None:
    """A second life on a copy of the disk; nothing that was refused or has left comes back in any domain."""
    twin = World(room / "twin", world.bundle, world.ring)
    shutil.copytree(world.folder, twin.folder)
    twin.boot()
    try:
        twin.agree()
        assert twin.versions == world.versions
        gone = {name_of(world.bundle, v, d) for v, d in state.ever.items() if v not in twin.versions}
        assert not gone & set(twin.by_domain().values())
    finally:
        twin.close(save=False)
        shutil.rmtree(twin.folder)


@pytest.mark.parametrize(("state_name", "name", "row", "fault", "when"), SOME)
def test_served_is_reported_is_stored(room, model, snapshots, state_name, name, row, fault, when):
    one(room, model, snapshots, state_name, name, row, fault, when)


@pytest.mark.slow
@pytest.mark.parametrize("state_name", STATES)
def test_served_is_reported_is_stored_in_every_case(room, model, snapshots, state_name):
    for case in CASES:
        if case.values[0] == state_name:
            try:
                one(room, model, snapshots, *case.values)
            except AssertionError as e:
                raise AssertionError(case.id) from e


def one(room, model, snapshots, state_name, name, row, fault, when):
    state, happening = STATES[state_name], HAPPENINGS[name]
    world = copy(snapshots[state_name], room / "world", model)
    try:
        world = lived_through(world, state, happening, row, fault, when)
        if fault != "a kill":  # a death leaves the bank of before
            world.save_bank()
        decides_the_same_again(world, room, state)
    finally:
        world.close(save=False)
        shutil.rmtree(room / "world")


def lived_through(world: World, state: State, happening: Happening, row: Row | None, fault: str, when: str) -> World:
    event, expected = happening.event, happening.then(state)
    world.boot(start=event is not Event.START)
    if event is not Event.START:
        state.stand(world)
        world.agree(standing=state.standing)
    engine = world.slot.current
    if row is not None:
        arm(world, event, row, fault, when)
    raised = quietly(lambda: happening.do(world, state))
    if isinstance(raised, Killed) or (raised is not None and event is Event.START):  # a fault of ours ends a start, too
        world = reborn(world)
        world.agree()
        after = happening.always or event is Event.START or survived(event, row, when) is Stored.AFTER
        assert world.versions == (expected if after else state.now)
        asked_once(world, expected)
        return world
    disarm(world)
    done = row is None or row.step == "pruned" or event in (*LOCAL, Event.START)
    assert world.versions == (expected if done else left(state, happening, row, fault))
    stood = row is None or event not in LOCAL
    world.agree(standing=stood and (state.standing or done), stored=event is not Event.START or row is None)
    if not stood and raised is not None:
        assert world.slot.current is engine
    if not done:
        the_second_try(world, state, happening, row, fault)
    elif not stood:
        for _ in range(1 + RETRY_FRAMES // 12):  # the state is offered again
            happening.do(world, state)
        world.agree()
    return world


def survived(event: Event, row: Row, when: str) -> Stored:
    """What the table says is in force after a death in this step, or right after it."""
    rows = TABLE[event]
    i = rows.index(row)
    return row.stored if when == "after" else rows[i - 1].stored if i else Stored.BEFORE


def asked_once(world: World, expected: list[int]) -> None:
    """A request whose file a death left behind is carried out, but never twice."""
    if (world.folder / "rollback.request").exists():
        for _ in range(2):
            world.requests.look()
            assert world.versions == expected and not (world.folder / "rollback.request").exists()
        world.agree()


def the_second_try(world: World, state: State, happening: Happening, row: Row, fault: str) -> None:
    """What failed by its own fault is refused from now on; everything else is done when nothing fails."""
    blamed = is_blamed(state, happening, row, fault)
    assert blamed == bool(set(world.updater.memory().refused) - {name_of(world.bundle, 2, "d1")}) or happening.candidate == 2
    quietly(lambda: happening.do(world, state))
    assert world.versions == (left(state, happening, row, fault) if blamed else happening.then(state))
    world.agree(standing=state.standing)


def is_blamed(state: State, happening: Happening, row: Row, fault: str) -> bool:
    """A release that fails by its own fault is refused, unless it is just serving some domain."""
    newest = {state.ever[v]: v for v in state.now}.values()
    own = happening.event is Event.INSTALL and row.blames and fault not in PASSING
    return own and bool(happening.candidate) and happening.candidate not in newest


def left(state: State, happening: Happening, row: Row, fault: str) -> list[int]:
    """What is in force after a failure: what was before, without a release that was blamed."""
    return [v for v in state.now if v != happening.candidate or not is_blamed(state, happening, row, fault)]


def test_the_quick_cases_have_every_step_of_every_happening():
    assert len(CASES) > 6000 and len(SOME) > 400
    every = {(name, row and row.step) for _, name, row, _, _ in (case.values for case in CASES)}
    assert every == {(name, row and row.step) for _, name, row, _, _ in (case.values for case in SOME)}
