"""Plan, score, recall, claims and the report made of them; and the page as a browser would parse it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.page import accuracy_plot, render, traffic_plot
from demo.plan import FEWEST_FRAMES, make_plan, make_stream
from demo.report import Arrival, Life, Traffic, build, claims, failed
from demo.tally import Answer, Recall, Tally, recall
from refold.errors import UsageError

PLAN = make_plan(1000)
DOMAINS = {"clean": "d0", "fog": "d1", "noise": "d2"}


def a_tally(*, adapted: float = 0.8, frozen: float = 0.5, lag: int = 30, lost: tuple[int, ...] = ()) -> Tally:
    """A stream on which the device knows the domain `lag` frames after each change."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 10, PLAN.frames)
    wrong = (labels + 1) % 10
    tally = Tally(PLAN, labels, np.where(rng.random(PLAN.frames) < frozen, labels, wrong))
    for f in range(PLAN.frames):
        phase = PLAN.phase_of(f)
        before = PLAN.phase_of(max(phase.first - 1, 0))
        domain = DOMAINS[(phase if f - phase.first >= lag else before).weather]
        good = tally.frozen[f] if phase.weather == "clean" else (labels if rng.random() < adapted else wrong)[f]
        if f not in lost:
            tally.add(Answer(f, int(good), 0.4, 1, domain))
    return tally


def a_report(tally: Tally, arrivals: list[Arrival]) -> dict:
    traffic = Traffic()
    for frame in range(0, 1000, 50):
        traffic.observe(frame, frame // 10, frame * 300, frame * 10)
    first, again = PLAN.phases[1], PLAN.phases[3]
    return build(
        tally=tally,
        arrivals=arrivals,
        remembered=recall(tally, first, again, [(a.frame, a.domain) for a in arrivals]),
        traffic=traffic,
        lives=[Life("cloud", 10, 0.0, 9.0, 0), Life("edge", 11, 1.0, 8.0, None)],
        durations={"export": 2.0},
        bundle={"digest": "ab" * 32, "name": "<student & co>"},
        images="CIFAR-10",
        seed=3,
        notes=["a note with <b>markup</b>"],
        outage=(770, 900),
    )


ARRIVALS = [Arrival(1, 300, "d1", "a" * 64, 9000), Arrival(2, 560, "d2", "b" * 64, 9000), Arrival(3, 600, "d2", "c" * 64, 9000)]


@given(st.integers(FEWEST_FRAMES, 5000))
def test_phases_follow_each_other_without_gap(frames: int) -> None:
    plan = make_plan(frames)
    assert [p.weather for p in plan.phases] == ["clean", "fog", "noise", "fog"]
    assert plan.phases[0].first == 0 and plan.frames == frames == sum(p.frames for p in plan.phases)
    assert all(a.last == b.first and a.frames > 0 for a, b in zip(plan.phases, plan.phases[1:], strict=False))
    assert all(plan.phase_of(f) is p for p in plan.phases for f in (p.first, p.last - 1))


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(UsageError, match="at least"):
        make_plan(FEWEST_FRAMES - 1)


def test_stream_repeats_no_picture_while_there_are_any_and_a_seed_repeats_it() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1200, 32, 32, 3), np.uint8)
    labels = np.arange(1200)
    stream, again = (make_stream(PLAN, images, labels, 7) for _ in range(2))
    assert np.array_equal(stream.images, again.images) and len(set(stream.labels)) == PLAN.frames
    assert np.array_equal(stream.images[0], images[stream.labels[0]]), "the clean phase is the pictures themselves"
    few = make_stream(PLAN, images[:300], labels[:300], 7)
    assert len(few.images) == PLAN.frames and set(few.labels) == set(range(300))


def test_score_counts_each_frame_once_and_knows_what_is_missing() -> None:
    tally = a_tally(lost=(5, 999))
    assert tally.lost == 2 and tally.last == 998 and tally.twice == 0
    tally.add(Answer(7, 0, 0.0, 0, ""))
    tally.add(Answer(5000, 0, 0.0, 0, ""))
    assert tally.twice == 1 and tally.seen == 998
    clean = PLAN.phases[0]
    assert tally.accuracy(clean.first, clean.last)[0] == tally.accuracy(clean.first, clean.last)[1]
    assert np.isnan(tally.accuracy(5, 6)[0])


def test_accuracy_is_the_mean_of_the_window() -> None:
    tally = Tally(PLAN, np.zeros(1000, np.int64), np.ones(1000, np.int64))
    for f in range(400):
        tally.add(Answer(f, 0 if f >= 250 else 1, 0.1, 0, ""))
    assert tally.recent() == (75.0, 0.0) and tally.recent(300) == (25.5, 0.0)
    series = tally.series(100)
    assert series["frame"] == [100, 200, 300, 400] and series["adapted"] == [0, 0, 25, 75] and series["entropy"][0] == 0.1


def test_recall_is_seen_where_the_known_domain_serves_again() -> None:
    first, again = PLAN.phases[1], PLAN.phases[3]
    met = recall(a_tally(lag=30), first, again, [(520, "d2"), (again.first + 10, "d2")])
    assert met.frames == 30 and met.domain == "d1" and met.releases == 0 and met.adapted > met.frozen
    needed = recall(a_tally(lag=30), first, again, [(again.first + 10, "d1")])
    assert needed.releases == 1
    assert recall(a_tally(lag=900), first, again, []).frames == -1


def test_one_domain_for_everything_is_no_recall() -> None:
    tally = a_tally()
    tally.domain = ["d0"] * 300 + ["d1"] * 700
    assert recall(tally, PLAN.phases[1], PLAN.phases[3], []).frames == -1


@pytest.mark.parametrize(
    "change, broken",
    [
        ({}, set()),
        ({"lost": (4,)}, {"frames_lost"}),
        ({"adapted": 0.55}, {"shifted_gain"}),
        ({"lag": 400}, {"fog_recall_frames", "fog_recall_releases"}),
    ],
)
def test_each_claim_breaks_alone(change: dict, broken: set[str]) -> None:
    report = a_report(a_tally(**change), ARRIVALS)
    assert {c["id"] for c in report["claims"] if not c["holds"]} == broken
    assert report["holds"] is not bool(broken) and len(failed(report)) == len(broken)


def test_a_release_must_arrive() -> None:
    remembered = Recall(10, "d1", 0, 80.0, 60.0, 70.0, 80.0)
    none, one = ({c.id: c.holds for c in claims(a_tally(), some, remembered)} for some in ([], ARRIVALS[:1]))
    assert one["releases_in_one_life"] and not none["releases_in_one_life"]


def test_a_worse_clean_part_breaks_its_claim() -> None:
    tally = a_tally()
    for f in range(2):  # 1 point of 200 clean frames
        tally.predicted[np.flatnonzero(tally.predicted[:200] == tally.labels[:200])[f]] = -2
    tally.predicted[tally.predicted == -2] = 99
    report = a_report(tally, ARRIVALS)
    assert [c["id"] for c in report["claims"] if not c["holds"]] == ["clean_gain"]


def test_report_survives_json_and_says_what_was_seen() -> None:
    report = a_report(a_tally(), ARRIVALS)
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again["frames"] == 1000 and again["frames_lost"] == 0 and [r["version"] for r in again["releases"]] == [1, 2, 3]
    assert again["traffic"] == {"samples": 95, "share": 0.095, "bytes_up": 285000, "bytes_down": 9500}
    assert again["phases"][1]["gain"] == pytest.approx(again["phases"][1]["adapted"] - again["phases"][1]["frozen"], abs=0.011)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{tag} {k}" for k, _ in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_one_file_with_well_formed_pictures() -> None:
    report = json.loads(json.dumps(a_report(a_tally(), ARRIVALS)))
    page = render(report)
    parsed = _Tags()
    parsed.feed(page)
    assert not parsed.links and "url(" not in page and "<script" not in page
    assert "every claim holds" in parsed.text and "<b>markup" not in page and "fog again" in parsed.text
    for plot in (accuracy_plot(report), traffic_plot(report)):
        tree = ET.fromstring(plot)
        assert plot in page and len(tree.findall(".//{*}polyline")) >= 2
    assert accuracy_plot(report).count("<title>release") == 3


def test_page_of_a_run_in_which_nothing_happened() -> None:
    tally = Tally(PLAN, np.zeros(1000, np.int64), np.zeros(1000, np.int64))
    tally.add(Answer(0, 0, 0.1, 0, "d0"))
    report = a_report(tally, [])
    assert "not every claim holds" in render(report) and "did not recall" in render(report)
    json.dumps(report)


def test_a_slow_machine_gets_its_frames_slower_within_limits() -> None:
    from demo.run import FPS, SLOWEST_FPS, pace

    assert pace(5.0) == FPS and pace(60.0) == SLOWEST_FPS and SLOWEST_FPS < pace(16.0) < FPS
