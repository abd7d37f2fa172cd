"""OpenAI's API as OpenAI's own client uses it, and as a bad one does."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import pytest

from edge.experts.decode.sampling import Sampling
from edge.experts.decode.stops import Stops
from edge.experts.serve import Server, ServeSettings
from edge.experts.serve_turns import Full, Turns
from refold.errors import NetworkError, StorageError, UsageError


@pytest.fixture(scope="module")
def server(running):
    server = Server(running, ServeSettings(port=0, waiting=2, silence=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.drain()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(running, prompt, tokens):
    writing = running.generate(prompt, Sampling(max_tokens=tokens))
    list(writing)
    return writing.text


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_the_models_list_has_the_bundle(client):
    assert [m.id for m in client.models.list().data] == ["m"] and client.models.retrieve("m").owned_by == "refold"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_whole_and_streamed_is_the_models_text(client, running):
    wanted = alone(running, "Hello", 12)
    whole = client.completions.create(model="m", prompt="Hello", max_tokens=12)
    assert whole.choices[0].text == wanted and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 12, 17)
    options = {"include_usage": True}
    pieces = list(
        client.completions.create(model="m", prompt=list(b"Hello"), max_tokens=12, stream=True, stream_options=options)
    )
    assert "".join(p.choices[0].text for p in pieces if p.choices) == wanted
    assert pieces[-1].usage == whole.usage and pieces[-2].choices[0].finish_reason == "length" and len(pieces) > 4


def test_a_chat_whole_and_streamed_is_the_models_text(client, running):
    wanted = alone(running, "system: Be brief.\nuser: Hello\nassistant:", 6)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    whole = client.chat.completions.create(model="m", messages=messages, max_completion_tokens=6)
    assert whole.choices[0].message.content == wanted and whole.choices[0].message.role == "assistant"
    pieces = list(client.chat.completions.create(model="m", messages=messages, max_tokens=6, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == wanted
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].choices[0].finish_reason == "length"


def test_two_clients_at_once_each_get_their_text(client, running):
    prompts = ["Hello", "World, how", "Third"]
    wanted = [alone(running, p, 10) for p in prompts]
    got = {}

    def one(prompt):
        pieces = client.completions.create(model="m", prompt=prompt, max_tokens=10, stream=True)
        got[prompt] = "".join(p.choices[0].text for p in pieces)

    threads = [threading.Thread(target=one, args=(p,)) for p in prompts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [got[p] for p in prompts] == wanted


def test_a_stop_text_ends_the_answer_before_it_and_a_seed_repeats_a_draw(client, running):
    text = alone(running, "Hello", 24)
    stop = text[6:8]
    cut = client.completions.create(model="m", prompt="Hello", max_tokens=24, stop=[stop]).choices[0]
    assert cut.text == text[: text.find(stop)] and cut.finish_reason == "stop"
    draws = [client.completions.create(model="m", prompt="Hi", max_tokens=6, temperature=1.5, seed=s) for s in (3, 3, 4)]
    assert draws[0].choices[0].text == draws[1].choices[0].text != draws[2].choices[0].text


def test_stops_hold_back_what_may_become_one():
    stops = Stops(["END", "\n\n"])
    assert [stops.add(t) for t in ("a", "bE", "N", "x\n", "c", "EN", "D", "more")] == ["a", "b", "", "ENx", "\nc", "", "", ""]
    assert stops.found and stops.end() == ""
    unfinished = Stops(["END"])
    assert unfinished.add("aEN") + unfinished.end() == "aEN" and not unfinished.found


BAD = [
    (b"{", 400, "bad-json"),
    (b"[1]", 400, "bad-json"),
    (b"\xff\xfe", 400, "bad-json"),
    (b"[" * 100_000, 400, "bad-json"),
    (b'{"prompt": "x", "model": "gpt"}', 404, "model_not_found"),
    (b'{"model": "m"}', 400, "wrong-type"),
    (b'{"prompt": 3}', 400, "wrong-type"),
    (b'{"prompt": ["a", "b"]}', 400, "wrong-type"),
    (b'{"prompt": "x", "max_tokens": "many"}', 400, "wrong-type"),
    (b'{"prompt": "x", "max_tokens": true}', 400, "wrong-type"),
    (b'{"prompt": "x", "max_tokens": 0}', 400, "out-of-range"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "out-of-range"),
    (b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}", 400, "out-of-range"),
    (b'{"prompt": "x", "stream": "yes"}', 400, "wrong-type"),
    (b'{"prompt": "x", "stop": [1]}', 400, "wrong-type"),
    (b'{"prompt": "x", "n": 0}', 400, "out-of-range"),
    (b'{"prompt": "x", "logprobs": 6}', 400, "out-of-range"),
    (b'{"prompt": ""}', 400, "empty-prompt"),
    (b'{"prompt": [300]}', 400, "token"),
    (b'{"prompt": "\\ud800"}', 400, "text"),
    (b'{"prompt": "' + b"x" * 300 + b'"}', 400, "prompt-too-long"),
    (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 413, "too-large"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD, ids=[f"{i}-{c}" for i, (_, _, c) in enumerate(BAD)])
def test_a_bad_request_is_answered_with_its_reason(server, body, status, code):
    got, told = ask(server, "POST", "/v1/completions", body)
    assert (got, told["error"]["code"]) == (status, code)
    assert told["error"]["message"].endswith((".", "}", ")")) and set(told["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "messages",
    [None, [], "x", [3], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]],
)
def test_a_bad_chat_is_answered_with_its_reason(server, messages):
    status, told = ask(server, "POST", "/v1/chat/completions", json.dumps({"messages": messages}))
    assert status == 400 and told["error"]["param"] == "messages"


def test_what_a_web_page_could_send_is_refused(server):
    body = b'{"prompt": "x", "max_tokens": 1}'
    assert ask(server, "POST", "/v1/completions", body, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "POST", "/v1/completions", body, Host="evil.example:80")[0] == 403
    assert ask(server, "GET", "/v1/models", Host="localhost")[0] == 200
    assert ask(server, "GET", "/etc/passwd")[0] == 404


def test_a_body_without_length_or_never_sent_holds_nobody_up(server, client):
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n")
        assert s.recv(64).startswith(b"HTTP/1.1 411")
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert client.completions.create(model="m", prompt="x", max_tokens=1).choices[0].finish_reason == "length"


def wait(until, seconds=60.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_clients_that_leave_free_the_queue_and_one_too_many_is_told_to_come_again(server, client, running):
    """One generates, two wait; the fourth is refused; all three leave, and the next is served at once."""
    body = json.dumps({"prompt": "Hello", "max_tokens": 240, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    wait(lambda: server.turns.length == 0)
    sockets = []
    for i in range(3):
        sockets.append(socket.create_connection(("127.0.0.1", server.port)))
        sockets[-1].sendall(head.encode() + body)
        wait(lambda n=i: server.turns.length == n + 1)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="m", prompt="x", max_tokens=1)
    made = running.pager.counters.tokens
    for s in sockets:
        s.close()
    wait(lambda: server.turns.length == 0)
    assert running.pager.counters.tokens < made + 100
    assert client.completions.create(model="m", prompt="x", max_tokens=1).choices[0].finish_reason == "length"


def test_a_failing_disk_is_the_servers_fault_in_both_ways_and_the_next_text_is_served(client, running, monkeypatch):
    real = running.pager.waves

    def waves(layer, experts):
        if running.pager.counters.tokens >= fails_at:
            raise StorageError("The disk failed.")
        return real(layer, experts)

    with monkeypatch.context() as m:
        m.setattr(running.pager, "waves", waves)
        for stream in (False, True):
            fails_at = running.pager.counters.tokens + 3
            with pytest.raises(openai.APIError, match="The disk failed") as e:
                answer = client.completions.create(model="m", prompt="Hello", max_tokens=9, stream=stream)
                list(answer)
            assert stream or isinstance(e.value, openai.InternalServerError)
    assert client.completions.create(model="m", prompt="Hello", max_tokens=3).choices[0].text == alone(running, "Hello", 3)


def test_turns_are_taken_in_order():
    turns, order, entered = Turns(5), [], threading.Event()

    def one(i):
        with turns.mine(lambda: False):
            entered.set()
            order.append(i)

    with turns.mine(lambda: False):
        threads = []
        for i in range(4):
            threads.append(threading.Thread(target=one, args=(i,)))
            threads[-1].start()
            wait(lambda n=i: turns.length == n + 2)
        assert not entered.is_set()
    for t in threads:
        t.join()
    assert order == [0, 1, 2, 3] and turns.length == 0
    with turns.mine(lambda: False), pytest.raises(Full), Turns(1).mine(lambda: False):
        raise Full


def test_settings_out_of_range_and_a_taken_port_are_refused(running, server):
    for wrong in ({"port": -1}, {"port": 70000}, {"waiting": 0}, {"body": 0}, {"silence": 0}, {"grace": -1}):
        with pytest.raises(UsageError):
            ServeSettings(**wrong)
    with pytest.raises(NetworkError, match=str(server.port)):
        Server(running, ServeSettings(port=server.port))


def test_sigterm_lets_the_text_in_progress_end_and_nothing_new_begin(paged, running):
    wanted = alone(running, "Hello", 60)
    command = [sys.executable, "-W", "error", "-m", "refold.cli", "edge", "serve-llm", str(paged.path), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--memory", "40KB"], stderr=subprocess.PIPE, text=True, env=environment, cwd=paged.path.parent
    )
    try:
        line = process.stderr.readline()
        port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
        assert "release 0" in line and "not enrolled" in line
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            stream = iter(client.completions.create(model="m", prompt="Hello", max_tokens=60, stream=True))
            text = next(stream).choices[0].text
            process.send_signal(signal.SIGTERM)
            text += "".join(p.choices[0].text for p in stream)
            with pytest.raises(openai.APIError):
                client.models.list()
        err = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert text == wanted and process.returncode == 0 and "no text was cut off" in err and "Traceback" not in err
