"""The small parts: token buckets, metrics, the log, tables."""

from __future__ import annotations

import io
import json
import logging
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cloud.ingest import held_back
from cloud.logs import JsonLines, is_json, set_up
from cloud.quota import Buckets
from cloud.show import show_releases, show_status
from cloud.telemetry import Counter, MetricsServer, render
from refold.errors import UsageError
from refold.v1 import admin_pb2


def test_a_bucket_refills_and_may_be_overdrawn_once() -> None:
    now = [0.0]
    buckets = Buckets(100, 10, lambda: now[0])
    assert buckets.take("a", 150) == 0 and buckets.room("a") == -50
    assert buckets.take("a", 1) == pytest.approx(5)
    assert buckets.take("b", 1) == 0
    now[0] = 6
    assert buckets.take("a", 1) == 0 and buckets.delay("a", 19) == pytest.approx(1)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 50)), max_size=50))
def test_nobody_gets_more_than_size_rate_and_one_overdraft(steps: list[tuple[float, float]]) -> None:
    now = [0.0]
    buckets, taken = Buckets(60, 60, lambda: now[0]), 0.0
    for wait, amount in steps:
        now[0] += wait
        if buckets.take("a", amount) == 0:
            taken += amount
    assert taken <= 60 + now[0] + 50 + 1e-6


@given(st.floats(0.01, 0.99))
def test_the_held_back_share_is_about_what_was_asked(share: float) -> None:
    import hashlib

    digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(2000)]
    assert abs(sum(held_back(d, share) for d in digests) / 2000 - share) < 0.05


def test_metrics_are_served_in_prometheus_text() -> None:
    counter = Counter("refold_test_total", "Of a test")
    counter.add(2, code='a"b\n')
    server = MetricsServer(0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert 'refold_test_total{code="a\\"b\\n"} 2\n' in text and text == render()
        assert "# TYPE refold_cloud_calls_total counter" in text
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=10)
        with pytest.raises(UsageError):
            MetricsServer(server.port)
    finally:
        server.close()


def test_json_log_lines_carry_code_detail_and_traceback() -> None:
    try:
        raise ValueError("x")
    except ValueError as e:
        info = (type(e), e, e.__traceback__)
    record = logging.LogRecord("cloud", logging.WARNING, "f", 1, "said %s", ("é",), info)
    record.code, record.detail = "quota", "secret"
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["level"], line["code"], line["detail"]) == ("said é", "warning", "quota", "secret")
    assert line["traceback"].endswith("ValueError: x")


def test_the_log_is_set_up_for_people_or_machines() -> None:
    root = logging.getLogger()
    before = root.handlers, root.level
    try:
        for as_json in (True, False):
            set_up("INFO", as_json=as_json)
            assert is_json() is as_json
    finally:
        root.handlers, _ = before[0], root.setLevel(before[1])


def test_tables_for_people() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    show_status(admin_pb2.StatusResponse(), console)
    show_releases([], console)
    assert "refold cloud token" in out.getvalue() and "No releases yet." in out.getvalue()
    row = admin_pb2.ReleaseRow(version=3, cohort="roof", state="rolled-back", reason="worse at night")
    show_releases([row, admin_pb2.ReleaseRow(state="refused", reason="collapse")], console)
    device = admin_pb2.DeviceStatus(device_id="gate-7", last_error="revoked", last_seen_unix_ms=1)
    cohort = admin_pb2.CohortStatus(bundle_name="net", cohort="roof", distiller="training d1")
    show_status(admin_pb2.StatusResponse(devices=[device], cohorts=[cohort]), console)
    text = out.getvalue()
    assert all(word in text for word in ("worse at night", "collapse", "gate-7", "revoked", "training d1", "d ago"))
