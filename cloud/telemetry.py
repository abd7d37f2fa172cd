"""Counters in Prometheus' text format, without its library: a few sums by label, served on loopback when a port is set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from refold.errors import UsageError

__all__ = [
    "CALLS",
    "EVIDENCE",
    "RELEASES",
    "SECONDS",
    "UPKEEP_FAILURES",
    "UPLOADS",
    "UPLOAD_BYTES",
    "Counter",
    "Gauge",
    "Levels",
    "MetricsServer",
    "render",
]

_REGISTRY: list[Counter | Gauge | Levels] = []


class Counter:
    """A sum that only grows, one per combination of labels."""

    kind = "counter"

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._sums: dict[tuple[tuple[str, str], ...], float] = {}
        self._lock = threading.Lock()
        _REGISTRY.append(self)

    def add(self, amount: float, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._sums[key] = self._sums.get(key, 0.0) + amount

    def rows(self) -> list[tuple[tuple[tuple[str, str], ...], float]]:
        with self._lock:
            return sorted(self._sums.items())


class Gauge:
    """A value read when somebody looks."""

    kind = "gauge"

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.name, self.text, self._read = name, text, read
        _REGISTRY.append(self)

    def rows(self) -> list[tuple[tuple[tuple[str, str], ...], float]]:
        return [((), self._read())]


class Levels:
    """Values that are set, one per combination of labels; a group of them is replaced as a whole."""

    kind = "gauge"

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._groups: dict[tuple[str, ...], list[tuple[tuple[tuple[str, str], ...], float]]] = {}
        self._lock = threading.Lock()
        _REGISTRY.append(self)

    def replace(self, group: tuple[str, ...], values: Sequence[tuple[Mapping[str, str], float]]) -> None:
        with self._lock:
            self._groups[group] = [(tuple(sorted(labels.items())), value) for labels, value in values]

    def rows(self) -> list[tuple[tuple[tuple[str, str], ...], float]]:
        with self._lock:
            return sorted(row for rows in self._groups.values() for row in rows)


CALLS = Counter("refold_cloud_calls_total", "Calls by method and outcome")
SECONDS = Counter("refold_cloud_call_seconds_total", "Seconds spent in calls, held polls included")
UPLOADS = Counter("refold_cloud_samples_total", "Samples by outcome: stored, duplicate, or the code of a refusal")
UPLOAD_BYTES = Counter("refold_cloud_sample_bytes_total", "Bytes of stored samples")
RELEASES = Counter("refold_cloud_decisions_total", "Candidates by state: released, refused or undecided")
UPKEEP_FAILURES = Counter("refold_cloud_upkeep_failures_total", "Failures of the service's own regular work, by work")
EVIDENCE = Levels(
    "refold_cloud_evidence",
    "Evidence by domain and kind: samples, samples_wanted, held_out, held_out_wanted, undecided",
)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def render() -> str:
    """Everything, in Prometheus' text exposition format 0.0.4."""
    lines: list[str] = []
    for metric in _REGISTRY:
        lines += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}"]
        for labels, value in metric.rows():
            inside = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels)
            lines.append(f"{metric.name}{{{inside}}} {value:g}" if inside else f"{metric.name} {value:g}")
    return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path.split("?")[0] == "/metrics"
        body = render().encode() if found else b"metrics are at /metrics\n"
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


class MetricsServer:
    """Serves `/metrics` on 127.0.0.1. Raises UsageError when the port is taken."""

    def __init__(self, port: int) -> None:
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        except OSError as e:
            raise UsageError(f"server.metrics_port {port} cannot be used: {e.strerror}.", code="port-in-use") from e
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
