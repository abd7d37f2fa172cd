"""Engines that cannot be built, or that make no sense, at every event: the real way in which a step named "applied" fails."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from machine_world import FAULTS, HAPPENINGS, PASSING, STATES, World, copy, make_bundle, name_of, quietly

from edge.updates.table import Event

KINDS = [fault for fault in FAULTS if fault != "a kill"]
NAMES = [name for name, happening in HAPPENINGS.items() if happening.event in (Event.INSTALL, Event.EXPORTED, Event.REVERT)]
CASES = [
    pytest.param(state, name, fault, part, id=f"{state} | {name} | {fault} in {part}")
    for i, (state, name, fault, part) in enumerate(itertools.product(STATES, NAMES, KINDS, ("build", "canary")))
    if HAPPENINGS[name].fits(STATES[state]) and i % 5 == 0
]


@pytest.fixture(scope="module")
def room():
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def snapshots(room):
    model, made = make_bundle(room), {}
    for i, (name, state) in enumerate(STATES.items()):
        made[name] = room / f"snapshot-{i}"
        made[name].mkdir()
        world = World(made[name], model).boot()
        state.build(world)
        world.close()
    return model, made


@pytest.fixture
def world_of(room, snapshots):
    opened = []

    def make(state_name: str) -> World:
        opened.append(copy(snapshots[1][state_name], room / f"world-{len(opened)}", snapshots[0]))
        return opened[-1]

    yield make
    for world in opened:
        world.close(save=False)
        shutil.rmtree(world.folder)


@pytest.mark.parametrize(("state_name", "name", "fault", "part"), CASES)
def test_no_engine_at_all_can_be_built(world_of, state_name, name, fault, part):
    """Every build fails while it happens: what served goes on, or something that needs no build, and all say the same."""
    state, happening = STATES[state_name], HAPPENINGS[name]
    world = world_of(state_name).boot()
    state.stand(world)
    before = world.slot.current

    def fail(*_):
        raise FAULTS[fault]()

    setattr(world.factory, {"build": "fails", "canary": "canary_fails"}[part], fail)
    quietly(lambda: happening.do(world, state))
    world.factory.fails = world.factory.canary_fails = lambda serving: None
    assert world.slot.current is before
    world.agree(standing=state.standing)
    assert world.versions == happening.then(state) or set(world.versions) <= set(state.now)  # less what was blamed
    versions = world.versions
    world.updater.close()
    world.boot().agree()
    assert world.versions == versions


@pytest.mark.parametrize("fault", KINDS)
def test_a_start_falls_back_release_by_release(world_of, fault):
    world = world_of("two for all")
    two, one = (name_of(world.bundle, v, "") for v in (2, 1))

    def fails(*names: str):
        def build(serving):
            if serving.release_digest in names:
                raise FAULTS[fault]()

        return lambda w: setattr(w.factory, "fails", build)

    world.boot(prepare=fails(two))
    assert world.versions == [1] == [world.served[0]]
    world.agree()
    assert (two in world.updater.memory().refused) == (fault not in PASSING)
    world.updater.close()
    world.boot(prepare=fails(one))
    assert world.versions == [] and world.served == (0, "")
    world.agree()
    world.updater.close()
    assert world.boot().versions == []
    outcome = world.order(2)
    assert (outcome.error is None) == (fault in PASSING)


def test_a_revert_passes_over_a_release_that_no_longer_builds(world_of):
    world = world_of("two domains, in one").boot()
    world.order(3, "d1")
    world.show("noisy")
    one = name_of(world.bundle, 1, "d1")

    def build(serving):
        if serving.release_digest == one:
            raise RuntimeError("a fault of ours")

    world.factory.fails = build
    world.updater.revert("a test")
    assert world.versions == [2] and world.served == (0, "")
    world.agree()
    assert one in world.updater.memory().refused
