"""The byte budget: no sliding hour exceeds it, whatever restarts and clocks do."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.budget import ByteBudget, SystemClock
from edge.outbox import Outbox


class HandClock:
    def __init__(self, boot: str = "boot-1") -> None:
        self.boot, self.t, self.w = boot, 1000.0, 1.8e9

    def steady(self) -> float:
        return self.t

    def wall(self) -> float:
        return self.w

    def pass_(self, seconds: float) -> None:
        self.t += seconds
        self.w += seconds


@pytest.fixture
def box(tmp_path):
    outbox = Outbox(tmp_path / "outbox.sqlite")
    yield outbox
    outbox.close()


def test_an_hour_holds_its_budget_and_no_more(box):
    clock = HandClock()
    budget = ByteBudget(1000, box, clock)
    assert budget.spend(600) and not budget.spend(401) and budget.spend(400)
    assert budget.available() == 0 and budget.spent() == 1000
    clock.pass_(3599)
    assert not budget.spend(1)
    clock.pass_(62)
    assert budget.spend(1000)


def test_none_is_unlimited_and_still_counted(box):
    budget = ByteBudget(None, box, HandClock())
    assert budget.spend(10**12) and budget.available() is None and budget.seconds_until(10**12) == 0
    assert budget.spent() == 10**12


def test_zero_sends_nothing(box):
    budget = ByteBudget(0, box, HandClock())
    assert not budget.spend(1) and budget.available() == 0 and math.isinf(budget.seconds_until(1))
    assert budget.seconds_until(0) == 0


def test_what_must_go_is_counted_and_makes_the_rest_wait(box):
    budget = ByteBudget(100, box, HandClock())
    budget.charge(150)
    assert budget.spent() == 150 and budget.available() == 0 and not budget.spend(1)


def test_waiting_as_long_as_told_is_enough(box):
    clock = HandClock()
    budget = ByteBudget(1000, box, clock)
    for _ in range(10):
        assert budget.spend(100)
        clock.pass_(100)
    wait = budget.seconds_until(250)
    assert 0 < wait < 3700
    clock.pass_(wait - 61)
    assert not budget.spend(250)
    clock.pass_(61)
    assert budget.spend(250)
    assert math.isinf(budget.seconds_until(1001))


def test_a_restart_forgets_nothing(box):
    clock = HandClock()
    ByteBudget(1000, box, clock).spend(1000)
    clock.pass_(1800)
    assert not ByteBudget(1000, box, clock).spend(1)
    clock.pass_(1861)
    assert ByteBudget(1000, box, clock).spend(1000)


def test_a_wall_clock_that_jumps_buys_nothing_within_a_boot(box):
    clock = HandClock()
    budget = ByteBudget(1000, box, clock)
    budget.spend(1000)
    clock.w += 10 * 86400
    assert not budget.spend(1)
    assert not ByteBudget(1000, box, clock).spend(1)
    clock.w -= 20 * 86400
    assert not ByteBudget(1000, box, clock).spend(1)
    clock.pass_(3661)
    assert ByteBudget(1000, box, clock).spend(1000)


def test_after_a_reboot_the_wall_clock_tells_and_never_backwards(box):
    clock = HandClock()
    ByteBudget(1000, box, clock).spend(1000)
    rebooted = HandClock("boot-2")
    rebooted.t, rebooted.w = 5.0, 0.0
    assert not ByteBudget(1000, box, rebooted).spend(1)
    rebooted.w = clock.w + 3661
    assert ByteBudget(1000, box, rebooted).spend(1000)


@given(st.lists(st.tuples(st.floats(0, 1500), st.integers(1, 700), st.booleans()), min_size=5, max_size=40))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_sliding_hour_exceeds_the_budget(tmp_path_factory, steps):
    box = Outbox(tmp_path_factory.mktemp("b") / "o.sqlite")
    clock, sent = HandClock(), []
    budget = ByteBudget(1000, box, clock)
    for wait, size, restart in steps:
        clock.pass_(wait)
        if restart:
            budget = ByteBudget(1000, box, clock)
        if budget.spend(size):
            sent.append((clock.t, size))
    for start, _ in sent:
        assert sum(size for t, size in sent if start <= t <= start + 3600) <= 1000
    box.close()


def test_the_kernel_clock_goes_forward():
    clock = SystemClock()
    assert clock.steady() <= clock.steady() and clock.wall() > 1.7e9
