"""OpenAI's API on loopback: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, and releases.

    GET  /v1/models              the one model
    POST /v1/completions         text to text; "stream": true sends server-sent events
    POST /v1/chat/completions    messages to a message
    GET  /refold/status          release in service, requests waiting, what the pager counted
    POST /refold/release         a signed release; in service when the answer comes, between two tokens of whoever generates

A release comes by POST and not by a watched folder: the sender learns in the answer whether and why it was refused, nothing
polls, and no half-written file is ever seen. What makes it safe is not the way but the signature.

Only this machine is answered: the socket is bound to 127.0.0.1, and requests that name another host (a web page that resolved
its own name to loopback) or that a web page could send without asking are refused.
"""

from __future__ import annotations

import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from edge.experts.decode.sampling import Sampling
from edge.experts.model import Cancelled, Piece, Running, Writing
from edge.experts.release import LARGEST, Live
from edge.experts.serve_openai import Choice, Refusal, Reply, Request, Scored, error, joined, model, models, parse, refusal_of
from edge.experts.serve_turns import Full, Gone, Turns
from refold.errors import NetworkError, RefoldError, UsageError

__all__ = ["ServeSettings", "Server"]

log = logging.getLogger(__name__)

LINGER_S, LINGER_BYTES = 1.0, 8 << 20
LOOPBACK = "127.0.0.1"
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
HOSTS = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class ServeSettings:
    """How requests are taken.

    Attributes:
        port: 0 for any free one. waiting: requests in the queue; one more is told to come again. connections: open at once.
        body: bytes of a request. silence: seconds a client may take to send its request. grace: seconds that texts in progress
            get to end after SIGTERM. defaults: of what a request does not say.

    Raises:
        UsageError: out of range.
    """

    port: int = 8080
    waiting: int = 16
    connections: int = 64
    body: int = 1 << 20
    silence: float = 30.0
    grace: float = 60.0
    defaults: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"A port is 0 to 65535, not {self.port}.")
        for name in ("waiting", "connections", "body"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is at least 1, not {getattr(self, name)}.")
        if not self.silence > 0 or not self.grace >= 0:
            raise UsageError("silence and grace are seconds, silence above 0.")


class Server:
    """Serves one model until `drain`.

    Attributes:
        port: the one in use. cut_off: texts in progress did not end in time.

    Args:
        live: takes releases; None: none is trusted, and `why_none` says why.

    Raises:
        NetworkError: the port is taken.
    """

    def __init__(self, running: Running, settings: ServeSettings, live: Live | None = None, why_none: str = "") -> None:
        self.running, self.settings, self.live, self.why_none = running, settings, live, why_none
        self.turns = Turns(settings.waiting)
        self.created = int(time.time())
        self.draining = threading.Event()
        self.stopping = threading.Event()
        self.cut_off = False
        self._busy = 0
        self._idle = threading.Condition()
        try:
            self._http = _Http((LOOPBACK, settings.port), self)
        except OSError as e:
            raise NetworkError(f"Port {settings.port} of {LOOPBACK} cannot be served: {e.strerror or e}.", code="port") from e
        self.port: int = self._http.server_address[1]

    def run(self) -> None:
        """Returns when `drain` has been called and the texts in progress have ended, or the grace is over."""
        self._http.serve_forever(poll_interval=0.1)
        with self._idle:
            self._idle.wait_for(lambda: not self._busy or self.stopping.is_set(), self.settings.grace)
            self.cut_off = self._busy > 0
        self.stopping.set()
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, 10)
        self._http.server_close()

    def drain(self) -> None:
        """No new texts; those in progress and in the queue end. A second call cuts them off. Safe in a signal handler."""
        if self.draining.is_set():
            self.stopping.set()
            return
        self.draining.set()
        threading.Thread(target=self._http.shutdown, daemon=True).start()

    def enter(self) -> None:
        """Raises Refusal: the server is ending."""
        with self._idle:
            if self.draining.is_set():
                raise Refusal(503, "The server is ending: ask another, or later.", code="draining", kind="server_error")
            self._busy += 1

    def leave(self) -> None:
        with self._idle:
            self._busy -= 1
            self._idle.notify_all()

    def status(self) -> dict[str, Any]:
        counters = self.running.pager.counters
        told = asdict(counters) | {"hit_rate": counters.hit_rate}
        return {
            "model": self.running.name,
            "release_version": self.live.version if self.live else 0,
            "requests": self.turns.length,
            "notes": list(self.running.defaults.notes),
            "pager": told,
        }


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], owner: Server) -> None:
        self.owner = owner
        self._open = threading.Semaphore(owner.settings.connections)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._open.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.sendall(FULL)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("A connection ended badly", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    protocol_version = "HTTP/1.1"
    server_version = "refold"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.owner.settings.silence)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        log.debug(format, *args)

    def do_GET(self) -> None:
        owner = self.server.owner
        gets: dict[str, Callable[[], Mapping[str, Any]]] = {
            "/v1/models": lambda: models(owner.running.name, owner.created),
            f"/v1/models/{owner.running.name}": lambda: model(owner.running.name, owner.created),
            "/refold/status": owner.status,
        }
        self._answer(lambda: self._json(200, self._one_of(gets)()))

    def do_POST(self) -> None:
        posts: dict[str, Callable[[], None]] = {
            "/v1/completions": lambda: self._complete(chat=False),
            "/v1/chat/completions": lambda: self._complete(chat=True),
            "/refold/release": self._release,
        }
        self._answer(lambda: self._one_of(posts)())  # noqa: PLW0108 - a refusal belongs inside

    def _one_of(self, known: Mapping[str, Any]) -> Any:
        path, _, query = self.path.partition("?")
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host") or ""
        if host.lower() not in HOSTS:
            raise Refusal(403, "Only requests to 127.0.0.1 or localhost are answered.", code="host")
        if path not in known:
            about = "There is no such model here." if path.startswith("/v1/models/") else f"There is nothing at {path[:100]}."
            raise Refusal(404, about, code="not-found")
        if query:
            raise Refusal(400, f"Parameters in the address are not supported: {query[:100]}.", code="unsupported")
        return known[path]

    def _answer(self, work: Callable[[], None]) -> None:
        """Whatever goes wrong becomes one JSON error, if nothing was sent yet; a client that left becomes nothing."""
        self._begun = False
        self._read_all = self.command == "GET"
        try:
            work()
        except (Gone, Cancelled, ConnectionError, TimeoutError):
            self.close_connection = True
        except Refusal as e:
            self._refuse(e)
        except RefoldError as e:
            refusal = refusal_of(e)
            log.log(logging.WARNING if refusal.status >= 500 else logging.DEBUG, "A request failed: %s", e.message)
            self._refuse(refusal)
        except Exception as e:
            log.exception("A request failed")
            self._refuse(Refusal(500, f"The server failed: {type(e).__name__}.", code="fault", kind="server_error"))

    def _refuse(self, e: Refusal) -> None:
        with suppress(OSError):
            if self._begun:
                self._event(error(e))
                self._chunk(b"")
                self.close_connection = True
                return
            if not self._read_all:
                self.close_connection = True
            self._json(e.status, error(e), retry=e.status in (429, 503))
            if not self._read_all:
                self._linger()

    def _linger(self) -> None:
        """Reads on for a moment what a refused client still sends: closing on it would lose it the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_S)
        left = LINGER_BYTES
        while left > 0 and (some := self.connection.recv(min(left, 1 << 16))):
            left -= len(some)

    def _body(self, limit: int, kind: str) -> bytes:
        if self.headers.get_content_type() != kind:
            raise Refusal(415, f"The content type is {kind}, not {self.headers.get_content_type()}.", code="content-type")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refusal(411, "The request says no Content-Length.", code="length")
        if int(length) > limit:
            raise Refusal(413, f"The request has {length} bytes; the limit is {limit}.", code="too-large")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError
        self._read_all = True
        return body

    def _json(self, status: int, content: Mapping[str, Any], *, retry: bool = False) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _gone(self) -> bool:
        """The client closed its side, or the server's patience is over."""
        if self.server.owner.stopping.is_set():
            return True
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # texts

    def _complete(self, *, chat: bool) -> None:
        owner = self.server.owner
        body = self._body(owner.settings.body, "application/json")
        request = parse(body, chat=chat, name=owner.running.name, defaults=owner.settings.defaults)
        owner.enter()
        try:
            with owner.turns.mine(self._gone):
                self._write(request, Reply(owner.running.name, chat=chat))
        except Full:
            raise Refusal(429, "Too many requests wait already: try again.", code="busy", kind="server_error") from None
        finally:
            owner.leave()

    def _write(self, request: Request, reply: Reply) -> None:
        running = self.server.owner.running
        prompt = running.codec.chat(request.messages) if request.messages else request.prompt
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        choices = []
        for i in range(request.texts):
            writing = running.generate(prompt, request.sampling.nth(i), self._gone, request.tokens)
            if request.stream and not i:
                self._open_events()
            choice = Choice(i, running.codec.piece, chat=request.chat)
            told = self._one(writing, choice, reply, stream=request.stream)
            choices.append(reply.choice(choice.text, writing.reason, index=i, logprobs=told))
            usage["prompt_tokens"] = len(writing.prompt)
            usage["completion_tokens"] += len(writing.tokens)
        usage["total_tokens"] = sum(usage.values())
        if not request.stream:
            self._json(200, reply.whole(choices, usage))
            return
        if request.usage:
            self._event(reply.costs(usage))
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _one(self, writing: Writing, choice: Choice, reply: Reply, *, stream: bool) -> dict[str, Any] | None:
        """Writes one text, and sends it as it comes where that was asked for. Returns its log probabilities."""
        index, all_told = choice.index, list[dict[str, Any] | None]()
        if stream:
            self._event(reply.piece("", first=True, index=index))
        try:
            for piece in writing:
                all_told.append(choice.add(piece.text, _scored(piece)))
                if stream and piece.text:
                    self._event(reply.piece(piece.text, index=index, logprobs=all_told[-1]))
        finally:
            writing.close()
        all_told.append(choice.rest(cut=writing.cut))
        if stream:
            self._event(reply.piece("", writing.reason, index=index, logprobs=all_told[-1]))
        return joined(all_told)

    def _open_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._begun = True

    def _event(self, content: Mapping[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    # releases

    def _release(self) -> None:
        owner = self.server.owner
        content = self._body(LARGEST, "application/octet-stream")
        if owner.live is None:
            raise Refusal(403, owner.why_none or "No release key is trusted here.", code="no-trust", kind="release_refused")
        owner.enter()
        try:
            outcome = owner.live.offer(content)
        finally:
            owner.leave()
        self._json(200, {"result": outcome.result.value, "version": outcome.version})


def _scored(piece: Piece) -> Scored | None:
    """None where log probabilities were not asked for, and of a token that only ends the text."""
    if piece.logprob is None or piece.ends:
        return None
    return Scored(piece.token, piece.logprob, piece.at, piece.top)
