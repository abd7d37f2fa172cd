"""Tokens are chosen as transformers chooses them, by generation_config.json unless the caller says otherwise."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import run_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from edge.experts.decode.choose import Chooser
from edge.experts.decode.plan import NOTHING, Defaults, Plan
from edge.experts.decode.sampling import Sampling
from edge.experts.model import Settings, load
from refold.cli import main
from refold.errors import BundleError, InputError, UsageError
from refold.experts import generation

PROMPT = list(b"Once upon a time")


def bundle(folder, told, family="mixtral", **config):
    """A bundle whose checkpoint had this generation_config.json; None: had none."""
    files = {} if told is None else {generation.FILE: told if isinstance(told, bytes) else json.dumps(told).encode()}
    return run_models.write(folder / "m.refold", run_models.random_model(family, **config), tokenizer=files)


def tokens(running, prompt=PROMPT, **sampling):
    writing = running.generate(prompt, Sampling(**sampling))
    list(writing)
    return writing.tokens


def theirs(running, told, seed=5, **more):
    """transformers' own generate, on the same paged model."""
    torch.manual_seed(seed)
    read = len(PROMPT) if not running.model.config.is_encoder_decoder else 1
    config = GenerationConfig(**told)
    out = running.model.generate(torch.tensor([PROMPT]), generation_config=config, tokenizer=None, **more)
    return out[0, read:].tolist()


FILES = {
    "greedy": {},
    "Qwen's": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    "Llama 3's": {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "only do_sample": {"do_sample": True},
    "sampling without do_sample": {"temperature": 0.6, "top_p": 0.9},
    "min_p": {"do_sample": True, "min_p": 0.2, "temperature": 1.5, "top_k": 0},
    "top_h": {"do_sample": True, "top_h": 0.5, "temperature": 1.5},
    "typical_p": {"do_sample": True, "typical_p": 0.5, "temperature": 1.5},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 0.01, "temperature": 1.5},
    "eta": {"do_sample": True, "eta_cutoff": 0.05, "temperature": 1.5},
    "repetition": {"repetition_penalty": 1.8},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [50, 60]]},
    "suppressed": {"suppress_tokens": list(range(0, 256, 2))},
    "suppressed at first": {"begin_suppress_tokens": list(range(0, 256, 2))},
    "bias": {"sequence_bias": [[[65], 6.0], [[66, 67], -4.0]]},
    "renormalised": {"do_sample": True, "renormalize_logits": True},
    "forced end": {"forced_eos_token_id": 13},
    "against the prompt": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 4.0, "hashing_key": 15485863}},
}


@pytest.mark.parametrize("what", list(FILES))
def test_a_file_is_honoured_as_transformers_honours_it(tmp_path, what):
    told = {"eos_token_id": [250, 251]} | FILES[what]
    paged = bundle(tmp_path, told)
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        assert running.defaults.notes == ()
        wanted = theirs(running, told | {"max_new_tokens": 12})
        got = tokens(running, max_tokens=12, seed=5)
        assert got == wanted
        other = tokens(running, max_tokens=12, seed=6)
        assert (got != other) == bool(FILES[what].get("do_sample"))
        if what in ("greedy", "sampling without do_sample"):
            assert got == tokens(running, max_tokens=12, temperature=0)
        if what == "forced end":
            assert got[-1] == 13


LENGTHS = {
    "max_new_tokens": ({"max_new_tokens": 7}, 7),
    "max_length": ({"max_length": len(PROMPT) + 5}, 5),
    "both": ({"max_new_tokens": 7, "max_length": len(PROMPT) + 5}, 7),
    "neither": ({}, 128),
}


@pytest.mark.parametrize("what", list(LENGTHS))
def test_lengths_are_the_files_unless_the_caller_says(tmp_path, what):
    told, count = LENGTHS[what]
    paged = bundle(tmp_path, told)
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        assert len(tokens(running)) == count and len(tokens(running, max_tokens=3)) == 3
        if "max_length" in told and "max_new_tokens" not in told:
            with pytest.raises(InputError, match=r"generation_config.json allows 21"):
                running.generate(PROMPT + PROMPT)


def test_a_list_of_tokens_ends_a_text_and_a_least_length_is_kept(tmp_path):
    paged = bundle(tmp_path, None)
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        free = tokens(running, max_tokens=30)
    ends = [free[9], free[4]]
    first = min(free.index(t) for t in ends)
    told = {"eos_token_id": ends, "bos_token_id": 1, "pad_token_id": 0}
    (tmp_path / "a").mkdir()
    paged = bundle(tmp_path / "a", told)
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        got = running.generate(PROMPT, Sampling(max_tokens=30))
        list(got)
        assert got.tokens == free[: first + 1] and got.reason == "stop"
        assert got.tokens == theirs(running, told | {"max_new_tokens": 30})
    (tmp_path / "b").mkdir()
    for more in (
        {"min_new_tokens": 20},
        {"min_length": 30},
        {"exponential_decay_length_penalty": [6, 1.5], "min_new_tokens": 4},
    ):
        with load(bundle(tmp_path / "b", told | more).path, Settings(memory=paged.index.total)) as running:
            got = tokens(running, max_tokens=30)
            assert got == theirs(running, told | more | {"max_new_tokens": 30})
            assert len(got) >= min(more.get("min_new_tokens", 14), 30)


def test_an_encoder_decoder_too(tmp_path):
    told = {
        "decoder_start_token_id": 3, "eos_token_id": 250, "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2,
        "forced_bos_token_id": 40, "repetition_penalty": 1.3, "do_sample": True, "temperature": 1.2, "top_k": 30,
    }  # fmt: skip
    paged = bundle(tmp_path, told, "switch_transformers")
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        got = tokens(running, max_tokens=16, seed=5)
        assert got == theirs(running, told | {"max_new_tokens": 16}) and got[0] == 40


def test_texts_and_time_end_a_text(tmp_path, monkeypatch):
    paged = bundle(tmp_path, {"max_time": 3.0})
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        whole = running.generate("Hello", Sampling(max_tokens=40))
        text = "".join(p.text for p in whole)
        now = iter(range(1000))
        with monkeypatch.context() as m:
            m.setattr("edge.experts.generate.time.monotonic", lambda: float(next(now)))
            assert len(tokens(running, max_tokens=40)) == 4
    at = next(i for i in range(3, len(text) - 2) if text[i : i + 2] not in text[:i] and "\ufffd" not in text[i : i + 2])
    for stops in (text[at : at + 2], [text[at : at + 2], "nothing"]):
        paged = bundle(tmp_path, {"stop_strings": stops})
        with load(paged.path, Settings(memory=paged.index.total)) as running:
            cut = running.generate("Hello", Sampling(max_tokens=40))
            assert "".join(p.text for p in cut) == cut.text == text[:at] and cut.reason == "stop" and cut.cut
            assert cut.tokens == whole.tokens[: len(cut.tokens)]
            other = running.generate("Hello", Sampling(max_tokens=40, stop=("nothing",)))
            assert "".join(p.text for p in other) == text and other.reason == "length"


def test_the_caller_says_otherwise(tmp_path):
    paged = bundle(tmp_path, {"do_sample": True, "temperature": 1.5, "top_k": 5, "repetition_penalty": 1.4})
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        pure = {"do_sample": False, "repetition_penalty": 1.4}
        assert tokens(running, max_tokens=16, temperature=0) == theirs(running, pure | {"max_new_tokens": 16})
        told = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
        said = {k: v for k, v in told.items() if k != "do_sample"}
        assert tokens(running, max_tokens=16, seed=5, **said) == theirs(running, told | {"max_new_tokens": 16})
        assert tokens(running, max_tokens=16, temperature=1.9, top_k=1, repetition_penalty=1) == tokens(
            running, max_tokens=16, temperature=0, repetition_penalty=1
        )


NOT_HONOURED = {
    "num_beams": 4, "num_return_sequences": 2, "penalty_alpha": 0.6, "dola_layers": "high", "guidance_scale": 1.5,
    "token_healing": True, "force_words_ids": [[1]], "remove_invalid_values": True, "cache_implementation": "quantized",
    "chat_format": "chatml",
}  # fmt: skip


def test_what_cannot_be_honoured_is_named_and_what_asks_for_nothing_is_not(tmp_path):
    told = NOT_HONOURED | {"early_stopping": True, "length_penalty": 2.0, "output_scores": True, "transformers_version": "4.1"}
    paged = bundle(tmp_path, told)
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        assert [any(f"{name}=" in note for note in running.defaults.notes) for name in NOT_HONOURED] == [True] * len(
            NOT_HONOURED
        )
        assert len(running.defaults.notes) == len(NOT_HONOURED)
    assert (
        generation.notes({"num_beams": 1, "guidance_scale": 1.0, "token_healing": False, "top_k": None, "dola_layers": None})
        == []
    )


def test_every_field_of_transformers_is_known():
    fields = set(GenerationConfig().to_dict()) | set(GenerationConfig._get_default_generation_params())
    assert fields <= set(generation.HONOURED) | generation.NO_EFFECT | set(generation.NEUTRAL)


@pytest.mark.parametrize(
    ("told", "word"),
    [
        (b"{", "damaged"), (b"[]", "damaged"), ({"temperature": -1}, "temperature is '-1'"), ({"top_p": 2}, "top_p"),
        ({"top_k": "many"}, "top_k"), ({"eos_token_id": "x"}, "eos_token_id"), ({"repetition_penalty": 0}, "repetition"),
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"bad_words_ids": [[-3]]}, "transformers refuses"),
        ({"exponential_decay_length_penalty": 3}, "transformers refuses"), ({"do_sample": "yes"}, "do_sample"),
        ({"bad_words_ids": [[300]]}, "transformers refuses"), ({"forced_eos_token_id": [3, 256]}, "forced_eos_token_id"),
        ({"decoder_start_token_id": 999}, "decoder_start"), ({"suppress_tokens": list(range(256))}, "Every token is ruled out"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_named(tmp_path, told, word):
    paged = bundle(tmp_path, told)
    with pytest.raises(BundleError, match=word) as e:
        load(paged.path, Settings(memory=paged.index.total))
    assert "generation_config.json" in e.value.message and e.value.code == "damaged"


def test_without_a_file_config_json_says_what_transformers_takes_from_it(tmp_path):
    assert Defaults.of(None, {"eos_token_id": 7, "repetition_penalty": 1.2, "hidden_size": 32}, "m").said == {
        "eos_token_id": 7, "repetition_penalty": 1.2,
    }  # fmt: skip


# the caller's own


def chosen(logits, before=(0,), count=1, **sampling):
    plan = Plan.of(Sampling(**sampling), NOTHING, list(before), None)
    model = run_models.random_model("mixtral")
    chooser = Chooser(model, plan, frozenset(), list(before))
    return [chooser.choose(logits) for _ in range(count)]


@pytest.mark.parametrize("asked", [{"temperature": 1e-37}, {"temperature": 1e-39}, {"temperature": 5e-324},
                                   {"temperature": 1.0, "repetition_penalty": 1e-45}])  # fmt: skip
def test_numbers_that_float32_cannot_divide_by_are_their_limit(asked):
    """Infinite logits have no softmax: the likeliest token is what a temperature of nearly nothing leaves."""
    (choice,) = chosen(torch.tensor([0.1, 3.0, 2.0, -1.0]), seed=1, **asked)
    assert choice.token == (0 if "repetition_penalty" in asked else 1)


def test_penalties_count_the_text_and_not_the_prompt():
    logits = torch.tensor([2.0, 1.9, 1.0, 0.0])
    assert [c.token for c in chosen(logits, [0, 0, 0], 4, presence_penalty=0.5)] == [0, 1, 0, 0]
    assert [c.token for c in chosen(logits, [0, 0, 0], 6, frequency_penalty=0.5)] == [0, 1, 0, 1, 0, 2]
    close = torch.tensor([2.0, 1.9, 1.1, 0.0])
    assert [c.token for c in chosen(close, [1], 3, repetition_penalty=2.0)] == [0, 2, 0]
    assert [c.token for c in chosen(logits, logit_bias={3: 5.0})] == [3]
    assert chosen(logits, logit_bias={0: -100.0})[0].token == 1


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    truth = logits.double().log_softmax(0)
    for more in ({}, {"temperature": 1.5, "seed": 1}, {"logit_bias": {3: 50.0}}, {"top_k": 1, "temperature": 2.0}):
        (told,) = chosen(logits, logprobs=2, **more)
        assert told.logprob == pytest.approx(float(truth[told.token]))
        assert told.top == tuple((i, pytest.approx(float(truth[i]))) for i in (0, 1))
    assert chosen(logits, logprobs=0)[0].top == () and chosen(logits)[0].logprob is None


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6),
    temperature=st.floats(0.3, 2),
    cut=st.sampled_from([{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 3, "min_p": 0.2}, {}]),
    seed=st.integers(0, 1000),
)
def test_a_draw_stays_within_what_is_kept(logits, temperature, cut, seed):
    tensor = torch.tensor(logits)
    p = (tensor.double() / temperature).softmax(0)
    ranked = p.sort(descending=True).values
    for told in drawn(tensor, temperature, cut, seed):
        mine = float(p[told])
        assert mine >= ranked[cut.get("top_k", 6) - 1] - 1e-6
        assert mine >= cut.get("min_p", 0) * ranked[0] - 1e-6
        above = float(ranked[ranked > mine + 1e-9].sum())
        assert above <= cut.get("top_p", 1) + 1e-5


MODEL = run_models.random_model("mixtral")


def drawn(logits, temperature, cut, seed):
    plan = Plan.of(Sampling(temperature=temperature, seed=seed, **cut), NOTHING, [0], None)
    chooser = Chooser(MODEL, plan, frozenset(), [0])
    return [chooser.choose(logits).token for _ in range(8)]


def test_a_draw_asked_for_without_a_temperature_is_one_at_1():
    logits = torch.tensor([1.0, 0.9, 0.8, 0.7])
    for more in ({"top_k": 3}, {"top_p": 0.95}, {"min_p": 0.1}):
        assert len(Counter(c.token for c in chosen(logits, count=60, seed=0, **more))) > 1
        assert len(Counter(c.token for c in chosen(logits, count=20, seed=0, temperature=0.0, **more))) == 1
    assert len(Counter(c.token for c in chosen(logits, count=20, seed=0, top_p=1.0, top_k=0, min_p=0.0))) == 1


def test_a_token_that_is_none_and_a_choice_of_none_are_refused(tmp_path):
    paged = bundle(tmp_path, {"suppress_tokens": [i for i in range(256) if i != 7], "bad_words_ids": [[7, 7]]})
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        with pytest.raises(InputError, match="logit_bias names token 256"):
            running.generate(PROMPT, Sampling(logit_bias={256: 1.0}))
        with pytest.raises(InputError, match="Every token is ruled out"):
            list(running.generate(PROMPT, Sampling()))


@pytest.mark.parametrize(
    "wrong",
    [{"top_k": -1}, {"min_p": 1.5}, {"repetition_penalty": 0}, {"presence_penalty": 3}, {"frequency_penalty": -2.1},
     {"logit_bias": {1: 101.0}}, {"logprobs": 21}, {"stop": ("",)}, {"stop": ("x",) * 17}, {"temperature": 2.1}],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)


def test_one_saying_over_another_and_seeds_of_several_texts():
    base = Sampling(temperature=0.5, top_k=7, stop=("x",), logit_bias={1: 2.0})
    both = Sampling(top_k=0, seed=3).over(base)
    assert (both.temperature, both.top_k, both.seed, both.stop, both.logit_bias) == (0.5, 0, 3, ("x",), {1: 2.0})
    assert both.nth(0) == both and len({both.nth(i).seed for i in range(5)}) == 5 and Sampling().nth(3) == Sampling()


# the command


def command(capfd, paged, *flags):
    main(["edge", "generate", str(paged.path), "Hello", "--memory", "1MB", "--json", *flags])
    told = capfd.readouterr()
    return json.loads(told.out), told.err


def test_flags_override_the_file_and_the_file_stands_without_them(tmp_path, capfd):
    paged = bundle(tmp_path, {"do_sample": True, "temperature": 1.4, "top_k": 20, "max_new_tokens": 6, "num_beams": 2})
    with load(paged.path, Settings(memory=1 << 20)) as running:
        ours = {
            (): {}, ("--temperature", "0"): {"temperature": 0.0}, ("--max-tokens", "9"): {"max_tokens": 9},
            ("--top-k", "2", "--top-p", "0.9", "--min-p", "0.1"): {"top_k": 2, "top_p": 0.9, "min_p": 0.1},
            ("--repetition-penalty", "1.5", "--presence-penalty", "1", "--frequency-penalty", "0.5"): {
                "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5,
            },
        }  # fmt: skip
        for flags, said in ours.items():
            told, err = command(capfd, paged, "--seed", "3", *flags)
            assert told["token_ids"] == tokens(running, "Hello", seed=3, **said) and "num_beams=2" in err
        whole, _ = command(capfd, paged, "--seed", "3", "--max-tokens", "20")
        stop = next(c for c in whole["text"][4:] if c not in whole["text"][:4])
        cut, _ = command(capfd, paged, "--seed", "3", "--max-tokens", "20", "--stop", stop, "--stop", "nothing")
        assert cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["reason"] == "stop"


def test_a_flag_out_of_range_and_a_file_that_cannot_be_meant_are_one_sentence(tmp_path, capfd):
    good = bundle(tmp_path, {})
    for flags in (["--top-k", "-1"], ["--min-p", "2"], ["--repetition-penalty", "0"], ["--stop", ""], ["--temperature", "3"]):
        with pytest.raises(SystemExit) as e:
            main(["edge", "generate", str(good.path), "Hello", *flags])
        assert e.value.code == 2 and len(capfd.readouterr().err.strip().splitlines()) == 1
    bad = bundle(tmp_path, {"temperature": "warm"})
    with pytest.raises(SystemExit) as e:
        main(["edge", "generate", str(bad.path), "Hello", "--memory", "1MB"])
    err = capfd.readouterr().err
    assert e.value.code == 5 and "temperature is 'warm'" in err and len(err.strip().splitlines()) == 1
