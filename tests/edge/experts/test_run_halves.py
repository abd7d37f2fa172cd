"""Resident matrices in 16 bits: the numbers of float32, in half the memory, in every family."""

from __future__ import annotations

import pytest
import run_models
import torch

from edge.experts import kernel
from edge.experts.decode.sampling import Sampling
from edge.experts.model import Settings, load
from edge.experts.model_halves import FEW, HalfEmbedding, HalfLinear
from refold.errors import UsageError

PROMPT = list(b"Once upon")
DECODERS = [family for family in run_models.FAMILIES if family != "switch_transformers"]


@pytest.fixture(scope="module", autouse=True)
def native():
    if not kernel.kernel().name.startswith("native"):
        pytest.skip("no native kernel: matrices stay float32")


def stored(family, folder, dtype, **config):
    """A bundle whose resident tensors have `dtype`, and the names of its 16-bit matrices."""
    model = run_models.random_model(family, **config).to(dtype)
    return run_models.write(folder / f"{family}.refold", model, dtype=dtype)


def bytes_of(model):
    held = [m.__dict__["half"] for m in model.modules() if isinstance(m, HalfLinear | HalfEmbedding)]
    halves = {t.data_ptr(): t.numel() * t.element_size() for t in held}
    return sum(halves.values()), sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", DECODERS)
def test_every_family_says_the_same_from_16_bits(family, dtype, tmp_path):
    paged = stored(family, tmp_path, dtype)
    logits, texts, sizes = [], [], []
    for resident in ("stored", "float32"):
        with load(paged.path, Settings(memory=paged.index.total, resident=resident)) as running, torch.inference_mode():
            logits.append(running.model(input_ids=torch.tensor([PROMPT])).logits)
            writing = running.generate(PROMPT, Sampling(max_tokens=12))
            list(writing)
            texts.append(writing.tokens)
            sizes.append(bytes_of(running.model))
    assert torch.allclose(*logits, atol=1e-4 * float(logits[1].abs().max()))
    assert texts[0] == texts[1]
    (halves, rest), (none, whole) = sizes
    assert halves > 0 and none == 0 and halves + rest < 0.6 * whole


def test_tied_embeddings_are_there_once(tmp_path):
    paged = stored("mixtral", tmp_path, torch.float16, tie_word_embeddings=True)
    with load(paged.path, Settings(memory=paged.index.total)) as running, torch.inference_mode():
        head, embedding = running.model.get_output_embeddings(), running.model.get_input_embeddings()
        assert head.__dict__["half"] is embedding.__dict__["half"]
        ours = running.model(input_ids=torch.tensor([PROMPT])).logits
    with load(paged.path, Settings(memory=paged.index.total, resident="float32")) as running, torch.inference_mode():
        assert torch.allclose(ours, running.model(input_ids=torch.tensor([PROMPT])).logits, atol=1e-4)


def test_few_tokens_and_many_have_the_same_numbers():
    half = torch.randn(70, 45).to(torch.bfloat16)
    layer = HalfLinear(half, torch.nn.Parameter(torch.randn(70)))
    x = torch.randn(2, FEW, 45)
    with torch.inference_mode():
        many = layer(x)
        few = torch.stack([layer(part) for part in x])
    assert many.shape == (2, FEW, 70) and torch.allclose(many, few, atol=1e-5)


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match="stored or float32, not 'float8'"):
        Settings(resident="float8")
