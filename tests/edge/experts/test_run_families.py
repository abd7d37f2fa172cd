"""Every family runs from paged records as from memory, bit for bit, and as transformers computes it, closely."""

from __future__ import annotations

import pytest
import run_models
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edge.experts.cache import floor
from edge.experts.decode.sampling import Sampling
from edge.experts.implementation import NAME, Paging
from edge.experts.model import Settings, load
from edge.experts.model_build import build
from refold.errors import BundleError, ModelError

PROMPT = list(b"Once upon a time")
TOKENS = 64


@pytest.fixture(scope="module", params=run_models.FAMILIES)
def pair(request, tmp_path_factory):
    """(transformers' model, its bundle at 8 bits)."""
    model = run_models.random_model(request.param)
    return model, run_models.write(tmp_path_factory.mktemp("m") / "m.refold", model)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    model = run_models.random_model("mixtral")
    return model, run_models.write(tmp_path_factory.mktemp("m") / "m.refold", model)


def run(paged, memory, tokens=TOKENS, **settings):
    with load(paged.path, Settings(memory=memory, **settings)) as running:
        writing = running.generate(PROMPT, Sampling(max_tokens=tokens))
        list(writing)
        return writing, running.pager.counters


def test_an_eighth_of_the_experts_gives_the_tokens_of_all_of_them(pair):
    _, paged = pair
    eighth = max(paged.index.total // 8, floor(paged.index))
    resident, all_there = run(paged, paged.index.total)
    small, counters = run(paged, eighth)
    assert small.tokens == resident.tokens and len(small.tokens) == TOKENS
    assert len(set(small.tokens)) > 1 or paged.index.geometry.family == "switch_transformers"
    assert counters.evictions > 0 and all_there.evictions == 0 and counters.resident_bytes <= eighth


def test_logits_are_close_to_transformers_own(pair):
    model, paged = pair
    decoder = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if model.config.is_encoder_decoder else {}
    with load(paged.path, Settings(memory=floor(paged.index))) as running, torch.inference_mode():
        ids = torch.tensor([PROMPT])
        wanted = model(input_ids=ids, **decoder).logits
        got = running.model(input_ids=ids, **decoder).logits
    error = (got - wanted).square().mean().sqrt() / wanted.std()
    assert error < 0.08, error  # 8-bit weights, and a token near a tie may take another expert


def test_nothing_of_an_expert_is_in_the_model(pair):
    model, paged = pair
    with load(paged.path, Settings(memory=floor(paged.index))) as running:
        names = [n for n, _ in running.model.named_parameters() if ".experts." in n]
        held = sum(p.numel() for p in running.model.parameters())
        assert not names and not any(p.is_meta for p in running.model.parameters())
        assert running.model.config._experts_implementation == NAME
    experts = sum(m.size for pair in run_models.split(model)[0].values() for m in pair)
    assert held == sum(p.numel() for p in model.parameters()) - experts


def test_look_ahead_changes_reads_and_no_token(pair):
    _, paged = pair
    memory = paged.index.total // 2
    with_hints, told = run(paged, memory, 12)
    without, alone = run(paged, memory, 12, lookahead=False)
    assert with_hints.tokens == without.tokens
    assert told.ahead_bytes > 0 and alone.ahead_bytes == 0


def test_a_family_nobody_knows_is_refused_by_name(mixtral):
    _, paged = mixtral
    with pytest.raises(ModelError, match="gpt2"):
        build({"model_type": "gpt2"}, (), Paging(None, paged.index.geometry), "m.refold")


def test_a_missing_a_misshapen_and_a_foreign_tensor_are_named(mixtral):
    _, paged = mixtral
    tensors = dict(paged.resident_tensors())
    last = list(tensors)[-1]
    cases = {
        "lacks": {k: v for k, v in tensors.items() if k != last},
        "shape": tensors | {last: tensors[last]._replace(shape=(1, *tensors[last].shape))},
        "no place": tensors | {"nowhere.weight": tensors[last]},
    }
    for word, some in cases.items():
        with pytest.raises(BundleError, match=word):
            build(paged.config, some.items(), Paging(None, paged.index.geometry), "m.refold")


def test_a_model_of_a_terabyte_takes_its_shape_and_no_memory():
    config = CONFIG_MAPPING["mixtral"](
        **run_models.FAMILIES["mixtral"] | {"num_local_experts": 65536, "intermediate_size": 1 << 20}
    )
    geometry = run_models.Geometry("mixtral", (0, 1), 65536, 2, 32, 1 << 20, True, "silu", 32)
    with pytest.raises(BundleError, match="lacks"):
        build(config.to_dict(), (), Paging(None, geometry), "m.refold")
