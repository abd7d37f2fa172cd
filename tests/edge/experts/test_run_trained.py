"""The small trained Mixtral: the same text from an eighth of its experts, and English."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import run_models
import torch
from transformers import AutoModelForCausalLM

from edge.experts.cache import floor
from edge.experts.decode.sampling import Sampling
from edge.experts.model import Settings, load

PROMPT = "ROMEO:\nWhat light is this that "


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = Path(os.environ.get("REFOLD_DATA", "")) / "lm" / "tiny_mixtral"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("REFOLD_DATA is unset: this test needs lm/tiny_mixtral of shared/data")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, run_models.write(tmp_path_factory.mktemp("t") / "tiny.refold", model)


def tokens(paged, memory, count):
    with load(paged.path, Settings(memory=memory)) as running:
        writing = running.generate(PROMPT, Sampling(max_tokens=count))
        list(writing)
        return writing, running.pager.counters


@pytest.mark.data
@pytest.mark.parametrize("count", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_an_eighth_of_the_experts_writes_what_all_of_them_write(pair, count):
    _, paged = pair
    eighth = max(paged.index.total // 8, floor(paged.index))
    resident, _ = tokens(paged, paged.index.total, count)
    small, counters = tokens(paged, eighth, count)
    assert small.tokens == resident.tokens and len(small.tokens) == count
    assert counters.resident_bytes <= eighth and counters.evictions > 0
    assert small.text.isascii() and small.text.count(" ") >= count // 10


@pytest.mark.data
def test_eight_bits_lose_little_of_the_float_models_likelihood(pair):
    model, paged = pair
    text = (Path(os.environ["REFOLD_DATA"]) / "lm" / "tinyshakespeare.txt").read_bytes()[-1024:]
    ids = torch.tensor([list(text[i : i + 128]) for i in range(0, 1024, 128)])
    with load(paged.path, Settings(memory=floor(paged.index))) as running, torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(m(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
            for m in (model, running.model)
        ]
    assert 1.2 < losses[0] < 2.2 and abs(losses[1] - losses[0]) < 0.01, losses
