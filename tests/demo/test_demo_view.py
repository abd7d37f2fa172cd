"""What the terminal shows, read back from a recorded console."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from rich.console import Console

from demo.plan import make_plan
from demo.report import Arrival, Traffic
from demo.tally import Answer, Tally
from demo.view import LiveView, PlainView, Scene, make_view, sparkline


def a_scene(frames: int = 600) -> Scene:
    plan = make_plan(1000)
    tally = Tally(plan, np.zeros(1000, np.int64), np.ones(1000, np.int64))
    for f in range(frames):
        tally.add(Answer(f, 0, 0.25, 2, "d1"))
    return Scene(tally, Traffic(samples=40, bytes_up=123_000, bytes_down=2_500_000), [Arrival(2, 300, "d1")], 2, "d1", "a note")


def test_sparkline_has_a_block_per_value_and_a_gap_for_none() -> None:
    assert sparkline([0, 50, 100, 200, -5], 9) == "▁▅██▁"
    assert sparkline([float("nan"), 100], 9) == " █" and sparkline([1, 2, 3], 2) == "▁▁" and sparkline([], 5) == ""


def test_live_view_shows_accuracy_entropy_uploads_bytes_and_releases() -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, force_terminal=True, width=110, color_system=None))
    with view:
        view.step("exporting")
        view.say("a detail")
        view.show(a_scene())
    text = out.getvalue()
    for wanted in ("exporting", "a detail", "100.0 %", "0.0 %", "0.25 nats", "40 pictures", "123 kB", "2.50 MB", "v2 d1 @300"):
        assert wanted in text, wanted
    for phase in ("clean", "fog", "noise", "fog again", "a note", "frame 600 of 1,000"):
        assert phase in text, phase


def test_live_view_before_the_first_frame_and_on_a_narrow_terminal() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, force_terminal=True, width=30, color_system=None)) as view:
        view.show(a_scene(0))
    assert "–" in out.getvalue()


def test_plain_view_writes_lines_without_escapes() -> None:
    out = io.StringIO()
    with PlainView(Console(file=out), every=0) as view:
        view.step("exporting [bold]")
        view.show(a_scene(0))
        view.show(a_scene())
        view.show(a_scene())
    text = out.getvalue()
    assert "\x1b" not in text and "exporting [bold]" in text
    assert text.count("release 2 for d1 applied at frame 300") == 1 and text.count("adapted 100.0 %") == 2


def test_a_pipe_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_view(live=True), PlainView) and isinstance(make_view(live=False), PlainView)
