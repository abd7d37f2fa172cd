"""What no domain explains: a lens cap, a dead or alternating sensor, one frame for ever, a class that was never seen. Each is
served as exported, counted, and forgotten when it is over."""

from __future__ import annotations

import numpy as np
import pytest
from adapter_device import Device
from small_nets import images

from edge.adapt import HOME
from edge.adapt.support import Change
from edge.engine import EngineFactory
from edge.statistics import Estimate
from refold import Bundle
from refold.errors import InputError

SIDE = 16
FRAMES = 250


def sensor(kind: str, side: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "lens cap":
        return np.clip(rng.normal(1, 0.7, (FRAMES, side, side, 3)), 0, 255).astype(np.uint8)
    if kind == "dead":
        return np.full((FRAMES, side, side, 3), 255, np.uint8)
    if kind == "alternating":
        two = np.stack([np.zeros((side, side, 3)), np.full((side, side, 3), 255)]).astype(np.uint8)
        return np.tile(two, (FRAMES // 2, 1, 1, 1))
    still = images(1, side, seed=5).astype(np.float64)
    shaken = np.clip(still * 0.4 + rng.normal(0, 3, (FRAMES, side, side, 3)), 0, 255)  # one dark scene, with a sensor's noise
    return shaken.astype(np.uint8)


@pytest.fixture
def device(bundle: Bundle, factory: EngineFactory) -> Device:
    return Device(bundle, factory)


@pytest.mark.parametrize("kind", ["lens cap", "dead", "alternating", "one scene for ever"])
def test_a_sensor_that_shows_nothing_changes_nothing(device: Device, kind: str) -> None:
    device.show(images(60, device.side, seed=11))
    device.show(sensor(kind, device.side))
    assert device.observer.passes == 0 and not device.serving.overlay and device.adapter.domain != HOME
    metrics = device.adapter.metrics()  # the same image twice is kept once: of an alternating sensor there is never a set
    assert (metrics["skipped"] > 0) == (kind == "one scene for ever")
    assert (metrics["images_blind"] > 0) == (kind != "one scene for ever")
    device.show(images(60, device.side, seed=12))
    assert device.adapter.domain == HOME and not device.serving.overlay


def test_moments_that_are_not_finite_are_not_counted(device: Device) -> None:
    channels, groups = device.adapter.model.layout.channels, device.adapter.model.class_moments.count
    bad = np.full((2, channels), np.nan)
    found = Estimate(bad, 64.0, np.full(groups, 1 / groups), bad, np.zeros((64, 5), np.float32))
    with pytest.raises(InputError, match="not finite"):
        device.adapter.measured(found, (0, 63), 64, device.serving, change=Change(), whole=True)
    with pytest.raises(InputError, match="not finite"):
        device.adapter.candidate(found)
    assert device.adapter.metrics()["measured"] == 0


def test_images_of_one_grey_level_each_have_variance_zero_and_harm_nothing(device: Device, bundle: Bundle) -> None:
    """A class the model never saw, and norms that see no variance within an image."""
    levels = np.random.default_rng(1).integers(0, 256, (FRAMES, 1, 1, 3)).astype(np.uint8)
    device.show(images(60, device.side, seed=11))
    device.show(np.broadcast_to(levels, (FRAMES, device.side, device.side, 3)).copy())
    table = bundle.norms
    assert all(np.isfinite(s.variance).all() and (s.variance >= 0).all() for s in device.serving.states.values())
    if device.serving.overlay:
        table.check(device.serving.states)
    device.show(images(80, device.side, seed=12))
    assert device.adapter.domain == HOME and not device.serving.overlay


def test_a_graph_that_gives_no_numbers_is_an_error_and_no_state(bundle: Bundle, factory: EngineFactory, monkeypatch) -> None:
    device = Device(bundle, factory)

    def nothing(*arguments: object, **more: object) -> object:
        raise InputError("The kept images' statistics are not finite: they are not used.", code="statistics")

    monkeypatch.setattr(device.observer, "_measure", nothing)
    device.show(images(60, device.side, seed=11))
    with pytest.raises(InputError):
        device.show((images(120, device.side, seed=12) * 0.25).astype(np.uint8))
    assert not device.serving.overlay
