"""A checkpoint that contradicts its config.json: settled as transformers settles it, or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from edge.experts.decode.sampling import Sampling
from edge.experts.model import Settings, load
from export.experts.measure import ORIGINAL, Measure
from export.experts.pipeline import Options, export_experts
from export.experts.source import Source
from export.experts.tokens import windows_of
from refold.errors import InputError
from refold.experts import PagedModel, dequantise, quantise

PROMPT = list(b"Once upon a time")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def changed(folder, to, tensors=None, drop=(), **config):
    """A copy with tensors put in or left out, and other values in config.json."""
    held = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in drop}
    to.mkdir()
    save_file(held | (tensors or {}), to / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(told))
    return to


def another(shape, seed=3):
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def theirs(folder, group, kind=AutoModelForCausalLM):
    """transformers' own model of a folder, its experts rounded as a bundle of 8 bits rounds them."""
    made = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if ".experts." in name:
                for matrix in p if p.dim() == 3 else [p]:
                    matrix.copy_(torch.from_numpy(dequantise(quantise(matrix.numpy(), 8, group))))
    return made


def tokens_of(model, count=24):
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True)
    return out[0, -count:].tolist()


@pytest.fixture(scope="module")
def tied(checkpoints, tmp_path_factory):
    """tie_word_embeddings: true beside another lm_head."""
    root = tmp_path_factory.mktemp("tied")
    return {
        name: changed(checkpoints[name], root / name, {HEAD: another((256, 64))}, tie_word_embeddings=True)
        for name in ("mixtral", "olmoe", "granitemoe")
    }


@pytest.mark.parametrize("resident", ["stored", "float32"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "granitemoe"])
def test_a_stored_head_that_differs_is_not_tied_and_the_text_is_transformers(tied, tmp_path, name, resident):
    told = export_experts(tied[name], tmp_path / "m.refold", Options(8))
    assert any("config.json ties lm_head.weight" in w and "differ" in w for w in told.warnings)
    paged = PagedModel.open(told.path)
    real = theirs(tied[name], paged.index.geometry.group)
    assert not torch.equal(real.get_input_embeddings().weight, real.get_output_embeddings().weight)
    wanted = tokens_of(real)
    ids = torch.tensor([PROMPT + wanted])
    with load(told.path, Settings(memory=paged.index.total, resident=resident)) as running, torch.inference_mode():
        ours, truth = running.model(input_ids=ids).logits, real(input_ids=ids).logits
        assert (ours - truth).square().mean().sqrt() < 0.08 * truth.std()
        assert (ours.argmax(-1) == truth.argmax(-1)).float().mean() > 0.9
        writing = running.generate(PROMPT, Sampling(max_tokens=8))
        list(writing)
        assert writing.tokens[:4] == wanted[:4]


def test_in_16_bits_too(tied, tmp_path):
    folder = tmp_path / "half"
    real = AutoModelForCausalLM.from_pretrained(tied["mixtral"]).to(torch.bfloat16)
    real.save_pretrained(folder)
    held = load_file_of(folder)
    assert HEAD in held and EMBEDDING in held
    export_experts(folder, tmp_path / "m.refold", Options(8))
    with load(tmp_path / "m.refold", Settings(memory=1 << 20)) as running, torch.inference_mode():
        ours = running.model(input_ids=torch.tensor([PROMPT])).logits
    truth = theirs(folder, 32)(input_ids=torch.tensor([PROMPT])).logits
    assert (ours - truth).square().mean().sqrt() < 0.08 * truth.std()


def load_file_of(folder):
    from safetensors.torch import load_file as load_torch

    return load_torch(folder / "model.safetensors")


def test_the_perplexity_measured_is_that_of_the_untied_model(tied, text):
    source = Source.open(tied["olmoe"])
    windows = windows_of(source.checkpoint, [text], 16, 4)
    loss = Measure(source, {}, windows, 1 << 20, lambda _: None).loss(dict.fromkeys(source.order, ORIGINAL))
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tied["olmoe"]).eval()(input_ids=ids[:, :-1]).logits
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())), rel=1e-5)


@pytest.mark.parametrize("dtype", [None, np.float16])
def test_a_stored_head_that_is_the_embedding_is_kept_once(checkpoints, tmp_path, dtype):
    held = load_file(checkpoints["mixtral"] / "model.safetensors")
    embedding = held[EMBEDDING] if dtype is None else held[EMBEDDING].astype(dtype).astype(np.float32)
    head = embedding if dtype is None else embedding.astype(dtype)
    folder = changed(checkpoints["mixtral"], tmp_path / "twice", {EMBEDDING: embedding, HEAD: head})
    told = export_experts(folder, tmp_path / "m.refold", Options(4))
    names = {n for n, _ in PagedModel.open(told.path).resident_tensors()}
    assert EMBEDDING in names and HEAD not in names and not any("ties" in w for w in told.warnings)


def test_only_the_head_is_stored_and_the_embedding_is_it(checkpoints, tmp_path):
    held = load_file(checkpoints["mixtral"] / "model.safetensors")
    folder = changed(checkpoints["mixtral"], tmp_path / "head", {HEAD: held[EMBEDDING]}, drop=[EMBEDDING])
    for name, source in (("a", checkpoints["mixtral"]), ("b", folder)):
        export_experts(source, tmp_path / f"{name}.refold", Options(8))
    logits = []
    for name in "ab":
        for resident in ("stored", "float32"):
            settings = Settings(memory=1 << 20, resident=resident)
            with load(tmp_path / f"{name}.refold", settings) as running, torch.inference_mode():
                logits.append(running.model(input_ids=torch.tensor([PROMPT])).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_an_encoder_decoder_with_another_head_keeps_its_scale(checkpoints, tmp_path):
    """Switch scales what goes into a tied head; transformers goes by config.json for that, whatever it ties."""
    folder = changed(checkpoints["switch_transformers"], tmp_path / "s", {HEAD: another((256, 64))})
    told = export_experts(folder, tmp_path / "m.refold", Options(8))
    assert any("ties lm_head.weight" in w for w in told.warnings)
    real = theirs(folder, 32, AutoModelForSeq2SeqLM)
    start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
    with load(told.path, Settings(memory=1 << 20)) as running, torch.inference_mode():
        ours = running.model(input_ids=torch.tensor([PROMPT]), **start).logits
        truth = real(input_ids=torch.tensor([PROMPT]), **start).logits
    assert (ours - truth).square().mean().sqrt() < 0.08 * truth.std()


EXTRA = {
    "a layer more": {"model.layers.2.self_attn.q_proj.weight": another((64, 64))},
    "a bias": {"model.layers.0.self_attn.q_proj.bias": another((64,))},
    "an expert more": {"model.layers.0.mlp.experts.4.gate_proj.weight": another((96, 64))},
    "scales of a quantised matrix": {"model.layers.0.self_attn.q_proj.weight_scale_inv": another((1, 1))},
}


@pytest.mark.parametrize("what", list(EXTRA))
def test_tensors_without_a_place_refuse_the_export_unless_told_to_leave_them(checkpoints, tmp_path, what):
    folder = changed(checkpoints["olmoe"], tmp_path / "bad", EXTRA[what])
    (name,) = EXTRA[what]
    with pytest.raises(InputError, match="gives no place") as e:
        export_experts(folder, tmp_path / "m.refold", Options(4))
    assert name in e.value.message and e.value.code == "unused" and not (tmp_path / "m.refold").exists()
    told = export_experts(folder, tmp_path / "m.refold", Options(4, unused=True))
    assert any(name in w and "left out" in w for w in told.warnings)


def test_tensors_that_families_carry_along_are_left_out_and_named(checkpoints, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(checkpoints["olmoe"], tmp_path / "old", {name: another((8,))})
    assert any(name in w for w in export_experts(folder, tmp_path / "m.refold", Options(4)).warnings)
    further = "model.layers.2.eh_proj.weight"
    folder = changed(checkpoints["deepseek_v3"], tmp_path / "mtp", {further: another((8, 8))}, num_nextn_predict_layers=1)
    assert any(further in w for w in export_experts(folder, tmp_path / "n.refold", Options(4)).warnings)


CONTRADICTIONS = {
    "vocabulary": ({"vocab_size": 300}, {}, (), "has shape 256 x 64 where config.json asks for 300 x 64"),
    "width": ({"hidden_size": 96}, {}, (), "has shape"),
    "layers": ({"num_hidden_layers": 3}, {}, (), r"lacks model\.layers\.2\."),
    "fewer layers": ({"num_hidden_layers": 1}, {}, (), r"no place to model\.layers\.1\."),
    "experts": ({"num_experts": 8}, {}, (), r"lacks model\.layers\.0\.mlp\.experts\.4|has shape"),
    "fewer experts": ({"num_experts": 2}, {}, (), "has shape 4 x 64|no place"),
    "no head": ({"tie_word_embeddings": False}, {}, (HEAD,), "lacks lm_head.weight: config.json does not tie it"),
    "integers": ({}, {"model.norm.weight": np.ones(64, np.int32)}, (), "model.norm.weight is I32: weights are"),
    "activation": ({"hidden_act": "nonsense"}, {}, (), "no possible model"),
}


@pytest.mark.parametrize("what", list(CONTRADICTIONS))
def test_sizes_types_and_numbers_that_contradict_are_refused_by_name(checkpoints, tmp_path, what):
    config, tensors, drop, sentence = CONTRADICTIONS[what]
    folder = changed(checkpoints["olmoe"], tmp_path / "bad", tensors, drop, **config)
    with pytest.raises(InputError, match=sentence):
        export_experts(folder, tmp_path / "m.refold", Options(4))
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_type_that_config_json_does_not_say_is_told(checkpoints, tmp_path):
    folder = changed(checkpoints["olmoe"], tmp_path / "type", dtype="bfloat16")
    told = export_experts(folder, tmp_path / "m.refold", Options(4))
    assert any("config.json says bfloat16" in w and "F32" in w for w in told.warnings)


def test_what_config_json_leaves_out_is_transformers_default(checkpoints, tmp_path):
    folder = changed(checkpoints["mixtral"], tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    for name in ("rms_norm_eps", "num_experts_per_tok", "hidden_act"):
        config.pop(name)
    (folder / "config.json").write_text(json.dumps(config))
    source = Source.open(folder)
    assert (source.geometry.top_k, source.geometry.activation) == (2, "silu")
    assert source.norms().norms[0].epsilon == pytest.approx(1e-5)


def test_generation_config_goes_along_with_or_without_a_tokenizer_and_is_checked(checkpoints, tmp_path):
    folder = changed(checkpoints["olmoe"], tmp_path / "said")
    told = {"eos_token_id": [3, 4], "do_sample": True, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(told))
    made = export_experts(folder, tmp_path / "m.refold", Options(4))
    paged = PagedModel.open(made.path)
    assert paged.generation_config() == told and paged.tokenizer_files() == {} and paged.bytes_as_tokens
    assert any("num_beams=4" in w for w in made.warnings)
    with load(made.path, Settings(memory=1 << 20)) as running:
        assert running.codec.stops == {3, 4} and len(running.defaults.notes) == 1
    for content, word in (('{"temperature": -1}', "temperature"), ("{", "is no JSON")):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(InputError, match=word):
            export_experts(folder, tmp_path / "n.refold", Options(4))
    assert not (tmp_path / "n.refold").exists()
