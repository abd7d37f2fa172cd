"""The adapter on real engines: a shift is met with an overlay, home with none, and what was met before is recalled."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from adapter_device import SETTINGS, Device, dim, model_of, noisy
from numpy.typing import NDArray
from small_nets import images

from edge.adapt import (
    HOME,
    Adapter,
    AdaptSettings,
    FrameFeatures,
    Reference,
)
from edge.adapt.support import LEAST
from edge.engine import EngineFactory
from edge.updates.inforce import InForce
from refold import Bundle, NormState
from refold.errors import StorageError
from refold.release import Release, encode

U8 = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def pixels_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network was never trained: what its answers say of a state is chance (tests/edge/adapt/test_support.py)."""
    monkeypatch.setattr("edge.adapt.proposal.supported", lambda shift, change: shift >= LEAST)


@pytest.fixture
def device(bundle: Bundle, factory: EngineFactory) -> Device:
    return Device(bundle, factory)


def release(bundle: Bundle, version: int, domain: str = "", scale: float = 1.1, frames: int = 10**6) -> Release:
    states = {
        s.name: NormState(s.exported.gamma * scale, s.exported.beta, s.exported.mean, s.exported.variance)
        for s in bundle.norms.norms
    }
    return Release(bundle.digest, "cohort", version, states, domain=domain, statistics_frames=frames)


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.allclose(a, b, rtol=1e-6))


def test_home_is_served_as_exported_and_nothing_is_kept(device: Device) -> None:
    device.show(images(300, device.side, seed=11))
    assert device.adapter.domain == HOME
    assert not device.serving.overlay
    assert device.kept == 0


def test_a_shift_is_met_with_an_overlay_that_brings_the_statistics_back(device: Device, bundle: Bundle) -> None:
    device.show(images(60, device.side, seed=11))
    device.show(noisy(images(120, device.side, seed=12)))
    assert device.adapter.domain == "d1"
    assert device.serving.overlay
    assert device.serving.domain == "d1"
    first = bundle.norms.norms[0]
    shifted = device.serving.states[first.name].variance / first.exported.variance
    assert np.median(shifted) > 1.005  # noise adds to what a first layer sees
    bundle.norms.check(device.serving.states)
    assert device.adapter.metrics()["overlay_weight"] > 0.3
    assert device.adapter.metrics()["shifts"] >= 1


def test_nothing_is_served_before_the_first_images_are_measured(device: Device) -> None:
    device.show(noisy(images(SETTINGS.probe_frames, device.side, seed=12)))
    assert not device.serving.overlay and device.observer.passes == 0
    served = []
    for picture in noisy(images(60, device.side, seed=13)):
        before = device.serving
        device.show(picture[None])
        if device.serving is not before:
            served.append(device.observer.passes)
    assert served and served[0] == 1  # every swap is one whole measurement
    assert served == sorted(set(served))


def test_a_domain_left_early_lets_its_images_go(device: Device) -> None:
    device.show(noisy(images(SETTINGS.probe_frames + 4, device.side, seed=12)))
    device.show(dim(images(60, device.side, seed=13)))
    assert device.adapter.domain == "d2"
    assert device.observer._kept is not None and len(device.observer._kept) <= SETTINGS.images


def test_a_still_camera_is_measured_as_one_image(device: Device) -> None:
    """The same frame for ever: kept once, so that nothing is made of it."""
    device.show(images(60, device.side, seed=11))
    device.show(np.repeat(noisy(images(1, device.side, seed=12)), 200, 0))
    assert device.observer.passes == 0 and not device.serving.overlay


def test_a_domain_met_before_is_recalled_with_its_evidence(device: Device) -> None:
    device.show(noisy(images(150, device.side, seed=12)))
    device.show(images(150, device.side, seed=13))
    assert device.adapter.domain == HOME
    assert not device.serving.overlay
    kept = device.kept
    device.show(noisy(images(60, device.side, seed=14)))
    assert device.adapter.domain == "d1"
    assert device.serving.overlay
    assert device.adapter.metrics()["recalls"] >= 2
    assert device.kept - kept < 50


def test_two_shifts_are_two_domains(device: Device) -> None:
    device.show(noisy(images(100, device.side, seed=12)))
    device.show(dim(images(100, device.side, seed=13)))
    assert {"d1", "d2"} <= set(device.domains)
    assert device.adapter.domain == "d2"


def test_a_false_alarm_leaves_the_slow_averages_as_they_were(device: Device) -> None:
    """Otherwise a domain that is only just outside sets off quick alarms for ever, and the slow average never ripens."""
    home = images(100, device.side, seed=11)
    device.show(home)
    device.adapter._begin(FrameFeatures.of(home[0], np.full(4, 0.25)).values)
    assert device.adapter.domain != HOME
    device.show(images(SETTINGS.probe_frames, device.side, seed=14))
    assert device.adapter.domain == HOME
    assert device.adapter._detector._ages[-1] > len(home)
    device.show(noisy(images(60, device.side, seed=12)))
    device.show(images(60, device.side, seed=15))
    assert device.adapter.domain == HOME
    assert device.adapter._detector._ages[-1] <= 60 + SETTINGS.probe_frames  # one that was left begins anew


def test_a_release_for_the_domain_is_served_and_recalled_later(device: Device, bundle: Bundle) -> None:
    device.show(noisy(images(100, device.side, seed=12)))
    made = release(bundle, 1, "d1")
    serving = device.adapter.on_release(made)
    assert serving is not None
    assert serving.release_version == 1
    for name, state in made.states.items():
        assert same(serving.states[name].gamma, state.gamma)
        assert np.allclose(serving.states[name].variance, state.variance, rtol=1e-3)  # they stand for a million frames
    device.serve(serving)
    device.show(images(100, device.side, seed=13))
    assert device.serving.release_version == 0
    device.show(noisy(images(60, device.side, seed=15)))
    assert device.serving.release_version == 1


def test_a_released_domain_counts_statistics_by_their_frames(device: Device, bundle: Bundle) -> None:
    """Right after a release its own statistics are served; taps behind it then weigh in, the less the more frames it had."""
    device.show(noisy(images(100, device.side, seed=12)))
    moved = []
    for version, frames in ((1, 1), (2, 100)):
        made = release(bundle, version, "d1", scale=1.0, frames=frames)
        serving = device.adapter.on_release(made)
        assert serving is not None
        assert all(same(serving.states[n].variance, s.variance) for n, s in made.states.items())
        device.serve(serving)
        device.show(noisy(images(40, device.side, seed=16)))
        assert device.serving.overlay
        first = bundle.norms.norms[0]
        moved.append(np.abs(device.serving.states[first.name].mean - first.exported.mean).sum())
    assert moved[1] < moved[0]


def test_a_rollback_takes_up_the_evidence_from_before(device: Device, bundle: Bundle) -> None:
    device.show(noisy(images(100, device.side, seed=12)))
    known = device.adapter._present.evidence
    device.adapter.on_release(release(bundle, 1, "d1"))
    device.adapter.on_release(release(bundle, 2, "d1"))
    assert device.adapter._present.evidence is not known
    device.adapter.on_rollback(None)
    assert device.adapter._present.evidence is known


def test_a_release_for_an_absent_domain_waits_and_for_an_unknown_one_is_left(device: Device, bundle: Bundle) -> None:
    device.show(noisy(images(100, device.side, seed=12)))
    device.show(images(150, device.side, seed=13))
    assert device.adapter.on_release(release(bundle, 1, "d1")) is None
    assert device.adapter.on_release(release(bundle, 2, "d77")) is None
    device.show(noisy(images(60, device.side, seed=14)))
    assert device.serving.release_version == 1


def test_a_release_for_all_domains_is_the_base_of_each(device: Device, bundle: Bundle) -> None:
    made = release(bundle, 3)
    serving = device.adapter.on_release(made)
    assert serving is not None
    assert serving.release_version == 3
    device.serve(serving)
    device.show(noisy(images(100, device.side, seed=12)))
    assert device.serving.overlay
    assert device.serving.release_version == 3
    assert all(same(device.serving.states[n].gamma, s.gamma) for n, s in made.states.items())


def test_a_rollback_forgets_every_newer_release(device: Device, bundle: Bundle) -> None:
    device.show(noisy(images(100, device.side, seed=12)))
    good = release(bundle, 1)
    device.adapter.on_release(good)
    device.adapter.on_release(release(bundle, 2, "d1", scale=3.0))
    back = device.adapter.on_rollback(good)
    assert back.release_version == 1
    assert back.overlay
    bare = device.adapter.on_rollback(None)
    assert bare.release_version == 0
    assert "d1" in {bare.domain}


def test_statistics_are_reported_once_and_per_domain(device: Device, bundle: Bundle) -> None:
    device.show(noisy(images(100, device.side, seed=12)))
    reports = []
    while (report := device.adapter.take_statistics()) is not None:
        reports.append(report)
    assert reports
    assert {r.domain for r in reports} == {"d1"}
    assert sum(r.frames for r in reports) <= device.kept
    assert all(a.last_frame < b.first_frame for a, b in itertools.pairwise(reports))
    assert len({r.digest for r in reports}) == len(reports)
    assert [s.site for s in reports[0].sites] == [s.name for s in bundle.norms.norms]
    assert reports[0].bundle_digest == bundle.digest


def test_the_bank_outlives_a_restart(device: Device, bundle: Bundle, factory: EngineFactory) -> None:
    device.show(noisy(images(150, device.side, seed=12)))
    device.adapter.on_release(release(bundle, 4, "d1"))
    content = device.adapter.dump()
    again = Adapter.load(
        content, model_of(bundle), SETTINGS, bundle.manifest.class_count, reference=Reference.measure(images(256, device.side))
    )
    again.commit(again.propose(device.adapter.releases), offered=False)
    restarted = Device(bundle, factory, again)
    restarted.show(noisy(images(60, device.side, seed=14)))
    assert again.domain == "d1"
    assert restarted.serving.release_version == 4


def test_a_bank_brings_no_release_back(device: Device, bundle: Bundle, factory: EngineFactory) -> None:
    """It names the release its statistics were gathered behind; unless the updater has it in force, neither is served."""
    device.show(noisy(images(150, device.side, seed=12)))
    before = device.adapter._present.evidence.frames
    device.adapter.on_release(release(bundle, 4, "d1"))
    device.show(noisy(images(30, device.side, seed=13)))
    content, made = device.adapter.dump(), device.adapter._present.evidence.frames
    assert before and made
    for releases, frames in ((InForce(), 0.0), (device.adapter.releases, pytest.approx(made))):
        again = Adapter.load(content, model_of(bundle), SETTINGS, 5, reference=Reference.measure(images(256, device.side)))
        again.commit(again.propose(releases), offered=False)
        known = again._bank.get("d1")
        assert known is not None and known.evidence.frames == frames and known.base == "".join(releases.digests)


@pytest.mark.parametrize("form", [1, 2, 3])
def test_a_bank_of_an_older_format_brings_its_domains_and_none_of_their_statistics(
    device: Device, bundle: Bundle, form: int
) -> None:
    """Those were measured in another way. The domains are recognised, and served as exported until they are measured again."""
    device.show(noisy(images(150, device.side, seed=12)))
    assert device.adapter._present.evidence.frames
    content = older_bank(device.adapter, form, {"d1": release(bundle, 4, "d1")} if form == 1 else {})
    again = Adapter.load(content, model_of(bundle), SETTINGS, 5, reference=Reference.measure(images(256, device.side)))
    again.commit(again.propose(InForce()), offered=False)
    known = again._bank.get("d1")
    assert known is not None and known.evidence.frames == 0 and known.mean.any()
    assert again.releases.version == 0


def older_bank(adapter: Adapter, form: int, releases: dict[str, Release]) -> bytes:
    """What versions before wrote."""
    arrays: dict[str, NDArray[np.generic]] = {}
    rows = []
    for d in adapter._bank:
        rows.append([d.name, d.frames, d.evidence.frames, d.seen, *([d.key, d.base, d.shared] if form > 1 else [])])
        arrays[f"{d.name}.mean"] = d.mean
        arrays[f"{d.name}.moments"] = d.evidence.moments.astype(np.float32)
        if d.name in releases:
            arrays[f"{d.name}.release"] = np.frombuffer(encode(releases[d.name]), np.uint8)
    head = {"format": form, "fingerprint": adapter._fingerprint(), "made": 2, "shifts": 3, "domains": rows}
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def test_a_damaged_or_foreign_bank_is_refused(device: Device, bundle: Bundle) -> None:
    content = device.adapter.dump()
    for wrong in (b"", b"not a bank", content[: len(content) // 2]):
        with pytest.raises(StorageError):
            Adapter.load(wrong, model_of(bundle), SETTINGS, 10)
    with pytest.raises(StorageError, match="another bundle"):
        Adapter.load(device.adapter._bank.dump("other"), model_of(bundle), SETTINGS, 10)


def test_the_bank_stays_bounded_and_keeps_home(bundle: Bundle, factory: EngineFactory) -> None:
    side = bundle.preprocess.height
    small = AdaptSettings(probe_frames=6, burst=4, watch_every=1, domains=3)
    adapter = Adapter(model_of(bundle), small, 10, reference=Reference.measure(images(256, side)))
    device = Device(bundle, factory, adapter)
    pictures = images(40, side, seed=20)
    for kind in (noisy(pictures), dim(pictures), 255 - dim(pictures), np.repeat(pictures[:, ::4, ::4], 4, 1).repeat(4, 2)):
        device.show(kind)
    assert adapter.metrics()["domains"] <= 3
    assert adapter._bank.get(HOME) is not None


def test_without_a_reference_the_first_frames_are_home(bundle: Bundle, factory: EngineFactory) -> None:
    device = Device(bundle, factory, Adapter(model_of(bundle), SETTINGS, 10))
    device.show(images(80, device.side, seed=11))
    assert device.adapter.domain == HOME
    device.show(noisy(images(60, device.side, seed=12)))
    assert device.adapter.domain == "d1"


def test_switched_off_it_keeps_nothing_and_serves_releases(bundle: Bundle, factory: EngineFactory) -> None:
    off = Adapter(model_of(bundle), AdaptSettings(enabled=False), 10, reference=Reference.measure(images(64, 16)))
    device = Device(bundle, factory, off)
    device.show(noisy(images(40, device.side, seed=12)))
    assert device.kept == 0
    serving = off.on_release(release(bundle, 1))
    assert serving is not None
    assert not serving.overlay


def test_a_shift_is_noticed_within_a_few_frames_though_one_in_three_is_watched(bundle: Bundle, factory: EngineFactory) -> None:
    """While an alarm is half reached every frame is watched; where nothing happens, one in `watch_every`."""
    settings = replace(SETTINGS, watch_every=3)
    home = Reference.measure(images(256, bundle.preprocess.height))
    device = Device(bundle, factory, Adapter(model_of(bundle), settings, 10, reference=home))
    device.show(images(90, device.side, seed=11))
    assert device.adapter.domain == HOME and device.adapter._detector._ages[0] < 60
    device.show(noisy(images(20, device.side, seed=12)))
    assert device.domains.index("d1") - 90 <= 12
