"""From a prompt to a text: sampling, growing text, limits, what a user is told when something is wrong, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import run_models
import torch
from expert_files import until
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.experts.cache import floor
from edge.experts.decode.choose import Chooser
from edge.experts.decode.plan import Defaults, Plan
from edge.experts.decode.sampling import Sampling
from edge.experts.faulty import FaultyFile
from edge.experts.generate_text import Bytes, Text
from edge.experts.implementation import Cancelled
from edge.experts.model import Settings, load
from edge.experts.trace import Trace
from refold.cli import main
from refold.errors import BundleError, InputError, StorageError, UsageError


def write(running, prompt="Hello", **sampling):
    writing = running.generate(prompt, Sampling(**sampling))
    pieces = list(writing)
    assert "".join(p.text for p in pieces) == writing.text
    return writing


def cancelled_after(count):
    asked = iter([False] * count)
    return lambda: next(asked, True)


# choosing


def test_greedy_is_the_most_probable_and_a_draw_is_the_seeds(running):
    greedy = write(running, max_tokens=8)
    assert greedy.tokens == write(running, max_tokens=8).tokens and greedy.reason == "length"
    drawn = [write(running, max_tokens=8, temperature=1.5, seed=s).tokens for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_draw_follows_the_probabilities_and_the_nucleus_cuts_their_tail(running):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((1.0, 4), (0.9, 3), (0.6, 2), (0.01, 1)):
        plan = Plan.of(Sampling(temperature=1, top_p=top_p, seed=0), Defaults({}), [0], None)
        chooser = Chooser(running.model, plan, frozenset(), [0])
        drawn = torch.tensor([chooser.choose(logits).token for _ in range(1200)])
        shares = torch.bincount(drawn, minlength=4) / 1200
        wanted = torch.where(torch.arange(4) < kept, logits.exp(), 0)
        assert (shares - wanted / wanted.sum()).abs().max() < 0.06
        assert (shares[kept:] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}],
)
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)


@pytest.mark.parametrize("wrong", [{"memory": 0}, {"memory": "much"}, {"policy": "fifo"}, {"readers": 0}, {"threads": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        Settings(**wrong)


# limits


def test_a_prompt_that_leaves_no_room_is_refused_and_an_answer_ends_with_the_context(running):
    with pytest.raises(InputError, match="256") as e:
        running.generate("x" * 256)
    assert e.value.code == "prompt-too-long"
    assert len(write(running, "x" * 250, max_tokens=99).tokens) == 6
    for nothing in ("", [], [256], [-1]):
        with pytest.raises(InputError):
            running.generate(nothing)


def test_a_stop_token_ends_a_text_and_has_none_itself(paged, running, monkeypatch):
    tokens = write(running, max_tokens=12).tokens
    at = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(running.stream, "_stops", frozenset({tokens[at]}))
    monkeypatch.setattr(running.codec, "stops", frozenset({tokens[at]}))
    stopped = write(running, max_tokens=12)
    assert stopped.tokens == tokens[: at + 1] and stopped.reason == "stop"
    assert stopped.text == bytes(tokens[:at]).decode(errors="replace")


def test_who_cancels_gets_no_further_token(running):
    told = []
    writing = running.generate("Hello", Sampling(max_tokens=9), lambda: len(told) >= 3)
    with pytest.raises(Cancelled):
        for piece in writing:
            told.append(piece)
    assert len(told) == 3 and writing.reason == "failed" and list(writing) == []


def test_who_cancels_within_a_prompt_waits_for_one_expert_not_for_the_prompt(running):
    asked = []
    before = running.pager.counters.tokens
    with pytest.raises(Cancelled):
        next(running.generate("Hello", Sampling(max_tokens=9), lambda: asked.append(1) or len(asked) > 4))
    assert len(asked) == 5 and running.pager.counters.tokens == before
    assert write(running, max_tokens=3).reason == "length"


# text


@settings(max_examples=50)
@given(st.text(min_size=1))
def test_bytes_grow_into_the_text_they_encode(text):
    try:
        encoded = Bytes(frozenset()).encode(text)
    except InputError:
        assert any("\ud800" <= c <= "\udfff" for c in text)
        return
    growing = Bytes(frozenset()).growing()
    pieces = [growing.add(t) for t in encoded]
    assert "".join(pieces) + growing.end() == text
    assert "\ufffd" not in "".join(pieces).replace("\ufffd" * text.count("\ufffd"), "") or "\ufffd" in text


@settings(max_examples=50)
@given(st.text(alphabet="añ€😀 b", min_size=1), st.integers(1, 4))
def test_text_of_a_tokenizer_never_shows_half_a_character(text, width):
    raw = text.encode()
    tokens = [raw[i : i + width] for i in range(0, len(raw), width)]
    growing = Text(lambda some: b"".join(some).decode(errors="replace"))
    pieces = [growing.add(t) for t in tokens]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + growing.end() == text


# the disk


def faulty(running, paged):
    file = FaultyFile(paged.path.read_bytes())
    running.pager._store._raw = file
    return file


@pytest.mark.parametrize("how", ["fail", "flip", "short"])
def test_a_disk_that_fails_in_mid_text_ends_it_with_a_sentence_and_no_wrong_token(paged, running, how):
    wanted = write(running, max_tokens=40).tokens
    with load(paged.path, Settings(memory=floor(paged.index), lookahead=False, verify="always")) as small:
        file = faulty(small, paged)
        writing, got = small.generate("Hello", Sampling(max_tokens=40)), []
        with pytest.raises((StorageError, BundleError)) as e:
            for piece in writing:
                got.append(piece.token)
                if len(got) == 5:
                    records = [paged.records_at + r.offset for r in paged.index]
                    if how == "short":
                        file.content = file.content[: min(records)]
                    else:
                        (file.flip.update(records) if how == "flip" else file.fail.update(dict.fromkeys(records, 5)))
        assert 5 <= len(got) < 40 and got == wanted[: len(got)] and list(writing) == []
        assert str(paged.path) in e.value.message and e.value.exit_code in (5, 7)
        if how != "short":
            assert "xpert" in e.value.message


def test_after_a_failed_text_the_next_one_is_right(paged):
    with load(paged.path, Settings(memory=floor(paged.index))) as running:
        wanted = write(running, max_tokens=12).tokens
        file = faulty(running, paged)
        file.fail.update({paged.records_at + r.offset: 5 for r in paged.index})
        with pytest.raises(StorageError):
            list(running.generate("Another prompt", Sampling(max_tokens=12)))
        until(lambda: running.pager._store.idle)  # a read-ahead that is still failing is the next text's error too
        file.fail.clear()
        assert write(running, max_tokens=12).tokens == wanted


def test_threads_that_compute_change_no_token_and_end_when_told_to(paged):
    long = "A prompt of more than eight tokens"
    texts = []
    for threads in (1, 3):
        with load(paged.path, Settings(memory=paged.index.total // 2, threads=threads)) as running:
            texts.append([write(running, p, max_tokens=24).tokens for p in ("Hello", long)])
            with pytest.raises(Cancelled):
                list(running.generate(long, Sampling(max_tokens=24), cancelled_after(40)))
            assert write(running, max_tokens=24).tokens == texts[0][0]
    assert texts[0] == texts[1]


def test_texts_that_take_turns_are_each_as_if_alone(running):
    alone = [write(running, p, max_tokens=10).tokens for p in ("Hello", "World, how")]
    both = [running.generate(p, Sampling(max_tokens=10)) for p in ("Hello", "World, how")]
    for _ in range(10):
        for writing in both:
            next(writing)
    assert [w.tokens for w in both] == alone


# the command


def refold(*args, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "refold.cli", "edge", "generate", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **more)


def test_the_command_streams_text_and_says_what_it_cost(paged, running, tmp_path, capfdbinary):
    trace = tmp_path / "t.jsonl"
    main(["edge", "generate", str(paged.path), "Hello", "--memory", "40KB", "--max-tokens", "9", "--trace", str(trace)])
    out, err = capfdbinary.readouterr()
    assert out.decode().rstrip("\n") == write(running, max_tokens=9).text
    assert b"tokens per second" in err and b"hit rate" in err and b"of 0.1 MB" in err
    got = Trace.load(trace)
    assert len(got) == 9 and all(len(token) == 2 for token in got.tokens)


def test_json_is_one_object_for_machines(paged, running, capfd):
    main(["edge", "generate", str(paged.path), "Hello", "--memory", "40KB", "--max-tokens", "1", "--json"])
    told = json.loads(capfd.readouterr().out)
    wanted = write(running, max_tokens=1)
    assert told["token_ids"] == wanted.tokens and told["text"] == wanted.text and told["reason"] == "length"
    assert told["tokens_per_second"] is None and told["first_token"] > 0 and told["memory"] == 40_000


def damaged(paged, folder, how):
    path = folder / "d.refold"
    raw = bytearray(paged.path.read_bytes())
    if how == "truncated":
        del raw[len(raw) // 2 :]
    if how == "flipped":
        for record in paged.index:
            if record.layer == 1:
                raw[paged.records_at + record.offset + 100] ^= 4
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [("truncated", 5, "truncated"), ("flipped", 5, "of layer 1"), ("budget", 2, "--memory"), ("gone", 5, "no bundle")],
)
def test_what_is_wrong_is_one_sentence_and_an_exit_code(paged, tmp_path, capfd, how, code, says):
    path = damaged(paged, tmp_path, how) if how != "gone" else tmp_path / "gone.refold"
    memory = "4KB" if how == "budget" else "40KB"
    with pytest.raises(SystemExit) as e:
        main(["edge", "generate", str(path), "Hello", "--memory", memory, "--max-tokens", "40"])
    out, err = capfd.readouterr()
    assert e.value.code == code and says in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not out.strip()


def test_ctrl_c_ends_cleanly_with_what_there_is(tmp_path):
    endless = run_models.write(tmp_path / "m.refold", run_models.random_model("mixtral", max_position_embeddings=16384))
    process = refold(endless.path, "Hello", "--memory", "16KB", "--max-tokens", "16000")
    try:
        first = process.stdout.read(1)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert first and process.returncode == 130
    assert b"Stopped." in err and b"Traceback" not in err and b"tokens per second" in err
