"""Every field of a request to OpenAI's API: honoured, without effect, or refused by name; asked by the real client."""

from __future__ import annotations

import http.client
import json
import math
import threading
import typing

import openai
import pytest
import run_models
import tokenizers_made
import torch
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from edge.experts.decode.sampling import Sampling
from edge.experts.model import Settings, load
from edge.experts.openai.fields import HONOURED, NEUTRAL, NO_EFFECT
from edge.experts.serve import Server, ServeSettings
from edge.experts.serve_openai import parse
from refold.experts.generation import FILE

PROMPT = "Once upon"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    tokenizer = tokenizers_made.byte_level()
    files = tokenizers_made.files_of(tokenizer, folder / "t")
    files[FILE] = json.dumps({"eos_token_id": [tokenizer.convert_tokens_to_ids("<|im_end|>")], "num_beams": 3}).encode()
    model = run_models.random_model("mixtral", vocab_size=len(tokenizer))
    paged = run_models.write(folder / "m.refold", model, tokenizer=files, bytes_as_tokens=False)
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        yield running


def serving(running, **defaults):
    return Server(running, ServeSettings(port=0, silence=5, defaults=Sampling(**defaults)))


@pytest.fixture(scope="module")
def server(running):
    server = serving(running)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.drain()
    thread.join(30)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def written(running, prompt=PROMPT, **sampling):
    writing = running.generate(prompt, Sampling(**sampling))
    return "".join(p.text for p in writing), writing


def complete(client, prompt=PROMPT, *, max_tokens=16, **more):
    extra = {k: more.pop(k) for k in ("top_k", "min_p", "repetition_penalty") if k in more}
    return client.completions.create(model="m", prompt=prompt, max_tokens=max_tokens, extra_body=extra, **more)


SAID = [
    {"temperature": 0.8, "seed": 1}, {"temperature": 1.3, "top_k": 3, "seed": 1}, {"temperature": 1.3, "min_p": 0.2, "seed": 1},
    {"temperature": 1.3, "top_p": 0.5, "seed": 1}, {"repetition_penalty": 1.7}, {"presence_penalty": 1.5},
    {"frequency_penalty": -1.2}, {"top_k": 3, "seed": 1}, {"temperature": 1.9, "top_k": 1},
]  # fmt: skip


@pytest.mark.parametrize("said", SAID, ids=str)
@pytest.mark.parametrize("chat", [False, True])
def test_what_is_said_of_sampling_reaches_the_text_whole_and_streamed(client, running, said, chat):
    if chat:
        extra = {k: said[k] for k in ("top_k", "min_p", "repetition_penalty") if k in said}
        rest = {k: v for k, v in said.items() if k not in extra}
        messages = [{"role": "user", "content": PROMPT}]

        def ask(**more):
            return client.chat.completions.create(
                model="m", messages=messages, max_completion_tokens=10, extra_body=extra, **rest, **more
            )

        wanted, _ = written(running, running.codec.chat(messages), max_tokens=10, **said)
        assert ask().choices[0].message.content == wanted
        assert "".join(p.choices[0].delta.content or "" for p in ask(stream=True)) == wanted
    else:
        wanted, _ = written(running, max_tokens=10, **said)
        assert complete(client, max_tokens=10, **said).choices[0].text == wanted
        assert "".join(p.choices[0].text for p in complete(client, max_tokens=10, stream=True, **said)) == wanted
    plain, _ = written(running, running.codec.chat(messages) if chat else PROMPT, max_tokens=10, temperature=0)
    assert (wanted == plain) == (said.get("top_k") == 1)


def test_the_servers_own_defaults_stand_where_a_request_says_nothing(running):
    server = serving(running, temperature=1.2, seed=4, top_k=6, max_tokens=9)
    told = parse(b'{"prompt": "x", "top_k": 2}', chat=False, name="m", defaults=server.settings.defaults).sampling
    assert (told.temperature, told.seed, told.top_k, told.max_tokens) == (1.2, 4, 2, 9)
    server._http.server_close()


def test_a_bias_of_one_token_is_that_token(client, running):
    token = running.codec.encode(" time")[0]
    got = complete(client, max_tokens=3, logit_bias={str(token): 100}, logprobs=0).choices[0]
    assert got.text == running.codec._decode([token] * 3)
    free = complete(client, max_tokens=1, logprobs=0).choices[0]
    banned = running.generate(PROMPT, Sampling(max_tokens=1))
    list(banned)
    other = complete(client, max_tokens=1, logit_bias={str(banned.tokens[0]): -100}, logprobs=0).choices[0]
    assert other.logprobs.tokens != free.logprobs.tokens


@pytest.mark.parametrize("count", [0, 1, 5])
def test_log_probabilities_of_a_completion_whole_and_streamed(client, running, count):
    whole = complete(client, max_tokens=10, logprobs=count).choices[0]
    _, writing = written(running, max_tokens=10)
    truth = []
    with torch.inference_mode():
        ids = torch.tensor([writing.prompt + writing.tokens])
        logged = running.model(input_ids=ids).logits[0].double().log_softmax(-1)
    truth = [float(logged[len(writing.prompt) - 1 + i, t]) for i, t in enumerate(writing.tokens)]
    told = whole.logprobs
    assert told.token_logprobs == pytest.approx(truth, abs=2e-2)
    raw = b"".join(running.codec.piece(t) for t in writing.tokens)
    assert raw.decode(errors="replace").rstrip("\ufffd") == whole.text.rstrip("\ufffd")
    assert len(told.tokens) == len(told.text_offset) == 10 and told.text_offset[0] == 0
    for i, name in enumerate(told.tokens):
        if not name.startswith("bytes:"):
            assert whole.text[told.text_offset[i] :].startswith(name)
    if count:
        assert all(count <= len(top) <= count + 1 for top in told.top_logprobs)
        assert all(max(top.values()) == max(v for v in top.values()) <= 0 for top in told.top_logprobs)
        assert all(name in top for name, top in zip(told.tokens, told.top_logprobs, strict=True))
    else:
        assert told.top_logprobs is None
    pieces = [p.choices[0] for p in complete(client, max_tokens=10, logprobs=count, stream=True)]
    streamed = [x for p in pieces if p.logprobs for x in zip(p.logprobs.tokens, p.logprobs.token_logprobs, strict=True)]
    assert streamed == list(zip(told.tokens, told.token_logprobs, strict=True))
    assert "".join(p.text for p in pieces) == whole.text


def test_log_probabilities_of_a_chat_whole_and_streamed(client, running):
    messages = [{"role": "user", "content": "Où est la gare? 😀"}]
    common = {"model": "m", "messages": messages, "max_tokens": 12, "logprobs": True, "temperature": 1.6, "seed": 2}
    whole = client.chat.completions.create(top_logprobs=4, **common).choices[0]
    assert len(whole.logprobs.content) == 12 and all(len(t.top_logprobs) == 4 for t in whole.logprobs.content)
    raw = b"".join(bytes(t.bytes) for t in whole.logprobs.content)
    assert raw.decode(errors="replace") == whole.message.content
    for token in whole.logprobs.content:
        assert token.logprob <= token.top_logprobs[0].logprob <= 0
        assert math.exp(token.top_logprobs[0].logprob) <= 1
    pieces = [p.choices[0] for p in client.chat.completions.create(top_logprobs=4, stream=True, **common)]
    assert [t for p in pieces if p.logprobs for t in p.logprobs.content] == whole.logprobs.content
    bare = client.chat.completions.create(**common).choices[0]
    assert [t.logprob for t in bare.logprobs.content] == [t.logprob for t in whole.logprobs.content]
    assert all(t.top_logprobs == [] for t in bare.logprobs.content)


def test_tokens_behind_a_stop_text_have_no_log_probabilities(client, running):
    text, _ = written(running, max_tokens=16)
    stop = text[5:8]
    cut = complete(client, stop=stop, logprobs=1).choices[0]
    assert cut.finish_reason == "stop" and cut.text == text[: text.find(stop)]
    assert all(at < len(cut.text) for at in cut.logprobs.text_offset)
    pieces = [p.choices[0] for p in complete(client, stop=stop, logprobs=1, stream=True)]
    assert [x for p in pieces if p.logprobs for x in p.logprobs.tokens] == cut.logprobs.tokens
    assert "".join(p.text for p in pieces) == cut.text and pieces[-1].finish_reason == "stop"


def test_several_texts_of_one_request(client, running):
    common = {"temperature": 1.4, "seed": 9, "n": 3}
    whole = complete(client, **common)
    texts = [c.text for c in whole.choices]
    assert [c.index for c in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == complete(client, **common | {"n": 1}).choices[0].text
    assert texts == [c.text for c in complete(client, **common).choices]
    assert whole.usage.completion_tokens == 48 and whole.usage.prompt_tokens == len(running.codec.encode(PROMPT))
    streamed = ["", "", ""]
    ends = []
    options = {"include_usage": True}
    for piece in complete(client, stream=True, stream_options=options, **common):
        for choice in piece.choices:
            streamed[choice.index] += choice.text
            ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts and ends == [0, 1, 2] and piece.usage == whole.usage
    greedy = complete(client, n=2, best_of=2)
    assert greedy.choices[0].text == greedy.choices[1].text


def test_the_same_request_and_seed_give_the_same_text_beside_others(client):
    common = {"temperature": 1.5, "top_p": 0.95, "seed": 11, "max_tokens": 20}
    alone = complete(client, **common).choices[0].text
    got, done = [], []

    def others(i):
        done.append(complete(client, prompt=f"Another {i}", temperature=1.9, max_tokens=8).choices[0].text)

    def same():
        got.append(complete(client, **common).choices[0].text)

    threads = [threading.Thread(target=others, args=(i,)) for i in range(4)]
    threads[2:2] = [threading.Thread(target=same) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [alone] * 3 and len(done) == 4


def test_a_completion_goes_on_where_its_prompt_ends(client, running):
    tokenizer = tokenizers_made.byte_level()
    whole = complete(client, max_tokens=12).choices[0].text
    _, writing = written(running, max_tokens=12)
    ids = tokenizer.encode(PROMPT) + writing.tokens
    assert PROMPT + whole == tokenizer.decode(ids, skip_special_tokens=True)


def test_tokens_that_end_a_text_are_the_files(client, running):
    end = running.codec.encode("<|im_end|>")[0]
    assert running.codec.stops == {end}
    cut = complete(client, logit_bias={str(end): 100}, logprobs=2)
    assert cut.choices[0].text == "" and cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens == 1
    assert cut.choices[0].logprobs is None


def ask(server, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(
            "POST", path, json.dumps(body) if isinstance(body, dict) else body, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_every_field_of_the_client_is_known():
    for chat, module in ((False, completion_create_params), (True, chat_create_params)):
        base = module.CompletionCreateParamsBase
        names = set(typing.get_type_hints(base)) | {"stream"}
        unknown = names - HONOURED[chat] - NO_EFFECT - set(NEUTRAL)
        assert unknown == ({"audio", "moderation", "prediction", "web_search_options"} if chat else set())


REFUSED = {
    "ignore_eos": True, "min_tokens": 3, "typical_p": 0.5, "guided_json": {}, "suffix": "x", "echo": True, "tools": [{}],
    "tool_choice": "required", "functions": [{}], "response_format": {"type": "json_object"}, "reasoning_effort": "high",
    "verbosity": "low", "store": True, "service_tier": "priority", "modalities": ["audio"], "audio": {}, "prediction": {},
    "web_search_options": {}, "temprature": 1, "best_of": 2, "stop_token_ids": [1], "add_special_tokens": False, "echo ": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.parametrize("chat", [False, True])
def test_a_field_that_is_not_supported_is_refused_by_name(server, name, chat):
    base = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, told = ask(server, path, base | {"max_tokens": 1, name: REFUSED[name]})
    assert status == 400 and told["error"]["code"] == "unsupported" and told["error"]["param"] == name
    assert name in told["error"]["message"]


def test_fields_that_belong_to_the_other_endpoint_are_refused(server):
    for path, base, name in (
        ("/v1/completions", {"prompt": "x"}, {"messages": []}), ("/v1/completions", {"prompt": "x"}, {"top_logprobs": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, {"prompt": "x"}),
    ):  # fmt: skip
        status, told = ask(server, path, base | name)
        assert status == 400 and told["error"]["code"] == "unsupported"


def test_fields_without_effect_and_values_that_ask_for_nothing_are_taken(server):
    nothing = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "k",
               "parallel_tool_calls": True, "store": False, "service_tier": "auto", "n": 1, "logit_bias": {},
               "presence_penalty": 0, "stop": None, "seed": None, "top_k": -1, "min_p": 0, "repetition_penalty": 1}  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "x", "name": None, "refusal": None, "tool_calls": []}],
            "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "logprobs": False,
            "top_logprobs": 0}  # fmt: skip
    assert ask(server, "/v1/chat/completions", nothing | chat | {"max_tokens": 1})[0] == 200
    assert ask(server, "/v1/completions", nothing | {"prompt": "x", "max_tokens": 1, "echo": False, "best_of": 1})[0] == 200


WRONG = [
    ({"top_k": 1.5}, "top_k", "wrong-type"), ({"top_k": -2}, None, "out-of-range"), ({"min_p": "x"}, "min_p", "wrong-type"),
    ({"min_p": 2}, None, "out-of-range"), ({"repetition_penalty": 0}, None, "out-of-range"),
    ({"presence_penalty": 2.5}, None, "out-of-range"), ({"frequency_penalty": True}, "frequency_penalty", "wrong-type"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "wrong-type"), ({"logit_bias": {"1": "2"}}, "logit_bias", "wrong-type"),
    ({"logit_bias": {"1": 101}}, None, "out-of-range"), ({"logit_bias": {"99999": 1}}, None, "token"),
    ({"logprobs": True}, "logprobs", "wrong-type"), ({"logprobs": -1}, "logprobs", "out-of-range"),
    ({"n": 17}, "n", "out-of-range"), ({"n": 2, "best_of": 3}, "best_of", "unsupported"), ({"seed": -1}, None, "out-of-range"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "contradiction"),
    ({"stream": True, "stream_options": {"continuous": True}}, "stream_options.continuous", "unsupported"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "unsupported"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "contradiction"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "param", "code"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_a_wrong_value_is_refused_by_name(server, more, param, code):
    status, told = ask(server, "/v1/completions", {"prompt": "x"} | more)
    assert (status, told["error"]["code"], told["error"]["param"]) == (400, code, param)


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "user", "content": "x", "name": "Ann"}, "messages[0].name"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
            "messages[0].content.cache_control",
        ),
        ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, "other media"),
    ],
)
def test_what_a_message_carries_beyond_text_is_refused_by_name(server, message, word):
    status, told = ask(server, "/v1/chat/completions", {"messages": [message]})
    assert status == 400 and word in told["error"]["message"] and told["error"]["param"] == "messages"


def test_chat_log_probabilities_need_to_be_asked_for(server):
    base = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert ask(server, "/v1/chat/completions", base | {"top_logprobs": 3})[1]["error"]["code"] == "contradiction"
    assert (
        ask(server, "/v1/chat/completions", base | {"logprobs": True, "top_logprobs": 21})[1]["error"]["code"] == "out-of-range"
    )
    assert ask(server, "/v1/chat/completions", base | {"logprobs": 0})[1]["error"]["code"] == "wrong-type"


def test_a_field_said_twice_and_a_parameter_in_the_address_are_refused(server):
    status, told = ask(server, "/v1/completions", b'{"prompt": "x", "top_k": 1, "top_k": 2}')
    assert status == 400 and told["error"]["param"] == "top_k"
    status, told = ask(server, "/v1/completions?api-version=1", {"prompt": "x", "max_tokens": 1})
    assert status == 400 and "api-version" in told["error"]["message"]


def test_what_the_model_asks_for_and_cannot_have_is_told(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/refold/status")
    told = json.loads(connection.getresponse().read())
    connection.close()
    assert any("num_beams=3" in note for note in told["notes"])
