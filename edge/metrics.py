"""What a device tells about itself: one flat snapshot of numbers, as a file, as Prometheus text, and in heartbeats."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from refold.atomic import discard
from refold.errors import StorageError, UsageError
from refold.network import join

__all__ = ["MetricsServer", "prometheus_text", "resident_bytes", "write_status"]

log = logging.getLogger(__name__)
CLIENT_S = 10.0  # a client that sends or takes nothing for so long is let go


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the kernel does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_status(path: Path, status: Mapping[str, Any]) -> None:
    """Replaces the file in one step; not synced, since a status is about now.

    Raises:
        StorageError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(status, indent=1) + "\n")
        temporary.replace(path)
    except OSError as e:
        discard(temporary)
        raise StorageError(f"{path} cannot be written: {e.strerror or e}.") from e


def prometheus_text(values: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """The text format, version 0.0.4: one gauge for each number."""
    told = ",".join(f'{k}="{_escape(v)}"' for k, v in labels.items())
    lines = []
    for name, value in sorted(values.items()):
        full = f"refold_edge_{name}"
        lines += [f"# TYPE {full} gauge", f"{full}{{{told}}} {value:.10g}"]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class MetricsServer:
    """GET /metrics, each request on a thread of its own.

    Args:
        text: made of values in memory: a scraper must get its answer whatever the disk does.

    Raises:
        UsageError: the port is taken or not allowed.
    """

    def __init__(self, host: str, port: int, text: Callable[[], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = CLIENT_S

            def do_GET(self) -> None:
                found = self.path == "/metrics"
                body = text().encode() if found else b"only /metrics is here\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
                return None

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as e:
            raise UsageError(f"Metrics cannot be served on {join(host, port)}: {e.strerror or e}.") from e
        self.port = int(self._server.server_address[1])
        self._server.handle_error = _failed  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)


def _failed(request: object, client_address: object) -> None:
    """A client that hangs up is not worth a traceback on stderr."""
    log.debug("A request for metrics from %s failed", client_address, exc_info=True)
