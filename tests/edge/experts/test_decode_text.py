"""Text grows behind its prompt into exactly what transformers decodes, whatever pieces its characters come in."""

from __future__ import annotations

import pytest
import tokenizers_made
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge.experts.decode.text import Text
from edge.experts.generate_text import Bytes, HuggingFace

KINDS = {"llama": tokenizers_made.llama, "byte-level": tokenizers_made.byte_level, "metaspace": tokenizers_made.metaspace}
EVERY = pytest.mark.parametrize("kind", list(KINDS))
LETTERS = "ab zé€😀中 \n\t.▁ \u0301�"


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    out = {}
    for kind, make in KINDS.items():
        files = tokenizers_made.files_of(make(), tmp_path_factory.mktemp(kind))
        out[kind] = HuggingFace(files, {"model_type": "mixtral"}, "m.refold")
    return out


def grown(codec, prompt, tokens):
    """(pieces, all of it)"""
    growing = codec.growing(prompt)
    pieces = [growing.add(t) for t in tokens]
    pieces.append(growing.end())
    return pieces, "".join(pieces)


def decoded(kind, ids):
    return KINDS[kind]().decode(ids, skip_special_tokens=True)


@EVERY
@settings(max_examples=80, deadline=None)
@given(prompt=st.text(LETTERS, max_size=12), more=st.text(LETTERS, max_size=12))
@example(prompt="The capital of France is", more=" Paris")
@example(prompt="中", more="中😀")
def test_a_completion_is_what_transformers_decodes_behind_the_prompt(codecs, kind, prompt, more):
    """Of a text in two parts, each encoded as it is: the second goes on where the first ends."""
    tokenizer = KINDS[kind]()
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = tokenizer.encode(more, add_special_tokens=False)
    whole, text = decoded(kind, before + after), decoded(kind, before)
    pieces, got = grown(codecs[kind], before, after)
    if text.endswith("�") and not whole.startswith(text):
        return  # the parts meet within a character; see below
    assert got == whole[len(text) :]
    assert "�" in whole or "�" not in "".join(pieces)


@EVERY
@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=14), at=st.integers(0, 14))
@example(ids=[197, 131, 0, 131], at=0)  # a special token, which has no text, between bytes
def test_any_tokens_at_all_grow_into_what_transformers_decodes(codecs, kind, ids, at):
    """Not only those that some text has: byte tokens that make no character, special ones in the middle."""
    before, after = ids[:at], ids[at:]
    whole, text = decoded(kind, ids), decoded(kind, before)
    _, got = grown(codecs[kind], before, after)
    if not text.endswith("�"):
        assert got == whole[len(text) :]
    else:  # what follows completes the prompt's last character, or does not: nothing of it is lost
        assert got in whole and (got == "" or whole.endswith(got) or kind == "llama")


@settings(max_examples=80, deadline=None)
@given(text=st.text(min_size=1).filter(lambda t: t.isprintable()), at=st.integers(0, 60))
def test_bytes_as_tokens_grow_too(text, at):
    codec = Bytes(frozenset())
    ids = codec.encode(text)
    before, after = ids[:at], ids[at:]
    _, got = grown(codec, before, after)
    whole = bytes(before).decode(errors="ignore")
    assert whole + got == text


@settings(max_examples=80, deadline=None)
@given(ids=st.lists(st.integers(0, 300), max_size=12))
def test_bytes_that_are_no_text_are_what_python_decodes(ids):
    assert grown(Bytes(frozenset()), (), ids)[1] == bytes(i for i in ids if i < 256).decode(errors="replace")


def test_a_completion_keeps_its_leading_space(codecs):
    for kind in ("llama", "metaspace"):
        tokenizer = KINDS[kind]()
        prompt = tokenizer.encode("The capital of France is", add_special_tokens=False)
        answer = tokenizer.encode("Paris", add_special_tokens=False)
        assert grown(codecs[kind], prompt, answer)[1] == " Paris"
        assert grown(codecs[kind], (), answer)[1] == "Paris"


def test_a_character_shows_as_soon_as_it_is_there_and_whole(codecs):
    tokenizer = KINDS["byte-level"]()
    pieces, got = grown(codecs["byte-level"], (), tokenizer.encode("a😀b", add_special_tokens=False))
    assert got == "a😀b" and "😀" in pieces and pieces[-1] == ""


def test_a_prompt_that_ends_within_a_character_loses_nothing_of_it(codecs):
    tokenizer = KINDS["llama"]()
    ids = tokenizer.encode("x😀yz", add_special_tokens=False)
    cut = next(i for i in range(len(ids)) if tokenizer.decode(ids[: i + 1]).endswith("�")) + 1
    assert grown(codecs["llama"], ids[:cut], ids[cut:])[1] == "😀yz"
    raw = "x😀yz".encode()
    assert grown(Bytes(frozenset()), list(raw[:3]), list(raw[3:]))[1] == "😀yz"


def test_a_text_of_any_length_decodes_a_few_tokens_at_a_time():
    seen = []

    def decode(tokens):
        seen.append(len(tokens))
        return "".join(f"{t} " for t in tokens)

    growing = Text(decode, range(1000))
    assert "".join(growing.add(t) for t in range(50)) == "".join(f"{t} " for t in range(50))
    assert seen[:2] == [1000, 1001] and max(seen[2:]) <= 2


@EVERY
def test_every_token_has_bytes(codecs, kind):
    tokenizer = KINDS[kind]()
    text = "The capital of France — 中😀 é\n" if kind != "metaspace" else "The capital of France"
    ids = tokenizer.encode(text, add_special_tokens=False)
    raw = b"".join(codecs[kind].piece(i) for i in ids)
    assert raw.decode().strip() == text.strip()
    assert codecs[kind].piece(10**9) == b"" and codecs[kind].piece(tokenizer.eos_token_id) == tokenizer.eos_token.encode()
