"""A TCP proxy on loopback that counts, holds back or breaks connections; no privileges needed."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Proxy:
    """Forwards to `target` port. `sent` counts bytes towards it.

    Attributes:
        passing: cleared, nothing moves in either direction although connections stay up (a NAT that forgot).
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.sent = 0
        self.passing = threading.Event()
        self.passing.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for a, b, up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(a, b, up), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.passing.wait()
                if self._closed:
                    return
                self.sent += len(data) if up else 0
                sink.sendall(data)
        for s in (source, sink):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Breaks every connection; new ones are welcome."""
        for s in self._open:
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.passing.set()
        self.cut()
        for s in self._open:
            s.close()
