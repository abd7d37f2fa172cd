"""Every family: what the bundle holds is the model, under the model's own names, from every way it is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_families
import torch
from transformers import AutoConfig

from export.experts.families import FAMILIES
from export.experts.measure import ORIGINAL, Measure
from export.experts.pipeline import Options, export_experts
from export.experts.source import Source
from export.experts.tokens import Windows, windows_of
from refold.experts import PagedModel, decode, dequantise, quantise

EVERY = pytest.mark.parametrize("name", list(tiny_families.CONFIGS))


def test_every_family_has_a_test():
    assert set(tiny_families.CONFIGS) == set(FAMILIES)


def rebuilt(paged: PagedModel, config: object, name: str) -> torch.nn.Module:
    """transformers' model with nothing but what the bundle holds."""
    import transformers

    made = getattr(transformers, FAMILIES[name].architecture)(config).eval()
    state = {n: torch.from_numpy(t.numpy().copy()) for n, t in paged.resident_tensors()}
    g = paged.index.geometry
    for layer in g.layers:
        pairs = [
            [torch.from_numpy(dequantise(m)) for m in decode(paged.read_record(layer, e), g.shapes, layer, e)]
            for e in range(g.experts)
        ]
        if g.gated:
            at = next(n for n in made.state_dict() if n.endswith(".gate_up_proj") and f".{layer}." in n)
            state[at] = torch.stack([p[0] for p in pairs])
            state[at.replace("gate_up_proj", "down_proj")] = torch.stack([p[1] for p in pairs])
        else:
            side, block, n = ("encoder", layer + 4, 1) if layer < 0 else ("decoder", layer, 2)
            for e, (inner, outer) in enumerate(pairs):
                prefix = f"{side}.block.{block}.layer.{n}.mlp.experts.expert_{e}"
                state[f"{prefix}.wi.weight"], state[f"{prefix}.wo.weight"] = inner, outer
    missing, unexpected = made.load_state_dict(state, strict=False)
    made.tie_weights()
    assert not unexpected, unexpected
    tied = {n for n, _ in made.named_parameters()} | {n for n, _ in made.named_buffers()}
    assert not set(missing) & tied, missing  # what is missing is only another name of something given
    return made


def rounded(name: str, group: int) -> torch.nn.Module:
    """transformers' own model with each expert's weights rounded where they are, as a bundle of 8 bits rounds them."""
    made = tiny_families.model(name)
    with torch.no_grad():
        for key, p in made.named_parameters():
            if ".experts." in key:
                for matrix in p if p.dim() == 3 else [p]:
                    matrix.copy_(torch.from_numpy(dequantise(quantise(matrix.numpy(), 8, group))))
    return made


@EVERY
def test_the_bundle_is_the_model(checkpoints, tmp_path, name):
    export_experts(checkpoints[name], tmp_path / "m.refold", Options(8))
    paged = PagedModel.open(tmp_path / "m.refold")
    real = rounded(name, paged.index.geometry.group)
    ours = rebuilt(paged, AutoConfig.from_pretrained(checkpoints[name]), name)
    ids = torch.arange(40).reshape(2, 20) * 5 % 256
    more = {"decoder_input_ids": ids} if name == "switch_transformers" else {}
    with torch.no_grad():
        a, b = real(input_ids=ids, **more).logits, ours(input_ids=ids, **more).logits
    assert torch.equal(a, b)
    assert paged.bytes_as_tokens and paged.config == json.loads((checkpoints[name] / "config.json").read_text())
    gains = {n for n, p in real.named_parameters() if "norm" in n and p.dim() == 1}
    assert {s.name for s in paged.bundle.norms.norms} == gains
    site = paged.bundle.norms.norms[0]
    assert np.allclose(site.exported.gamma, real.get_parameter(site.name).detach())
    assert site.tensors.multiply == site.name and site.kind.name == "RMS"


@EVERY
def test_what_is_measured_is_transformers_own_loss(checkpoints, tmp_path, name, text):
    source = Source.open(checkpoints[name])
    windows = windows_of(source.checkpoint, [text], 16, 4)
    measure = Measure(source, {}, windows, 1 << 20, lambda _: None)
    ours = measure.loss(dict.fromkeys(source.order, ORIGINAL))
    real, ids = tiny_families.model(name), torch.from_numpy(windows.ids)
    with torch.no_grad():
        if name == "switch_transformers":
            target = ids[:, 8:]
            before = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], 1)
            logits = real(input_ids=ids[:, :8], decoder_input_ids=before).logits
        else:
            target, logits = ids[:, 1:], real(input_ids=ids[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert ours == pytest.approx(float(theirs), rel=1e-5)
    share = measure.frequency()
    for layer in source.geometry.layers:
        got = sum(share[layer, e] for e in range(4))
        top_k = source.geometry.top_k
        assert got == pytest.approx(top_k) if name != "switch_transformers" else 0 < got <= 1


def test_fewer_bits_cost_more_and_the_cache_may_be_small(checkpoints, tmp_path, text):
    told = [
        export_experts(checkpoints["mixtral"], tmp_path / f"{b}.refold", Options(b, texts=[text], length=32)) for b in (8, 4, 2)
    ]
    assert told[0].before == told[1].before == told[2].before
    off = [abs(np.log(t.perplexity / t.before)) for t in told]
    assert off[0] < off[1] and off[0] < off[2]
    small = Options(4, texts=[text], length=32, cache_bytes=1)
    assert export_experts(checkpoints["mixtral"], tmp_path / "s.refold", small).perplexity == told[1].perplexity


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "granitemoe"])
def test_stacked_experts_are_the_same_bundle(checkpoints, tmp_path, name):
    tiny_families.save(name, tmp_path / "stacked", save_original_format=False)
    export_experts(checkpoints[name], tmp_path / "a.refold", Options(4, name="m"))
    export_experts(tmp_path / "stacked", tmp_path / "b.refold", Options(4, name="m"))
    assert (tmp_path / "a.refold").read_bytes() == (tmp_path / "b.refold").read_bytes()


def test_shards_are_the_same_bundle(checkpoints, tmp_path):
    tiny_families.save("olmoe", tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    export_experts(checkpoints["olmoe"], tmp_path / "a.refold", Options(4, name="m"))
    export_experts(tmp_path / "shards", tmp_path / "b.refold", Options(4, name="m"))
    assert (tmp_path / "a.refold").read_bytes() == (tmp_path / "b.refold").read_bytes()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_half_precision_stays_what_it_was(tmp_path, dtype, name):
    tiny_families.save("olmoe", tmp_path / "half", dtype=dtype)
    export_experts(tmp_path / "half", tmp_path / "m.refold", Options(8))
    paged = PagedModel.open(tmp_path / "m.refold")
    real = tiny_families.model("olmoe").to(dtype).state_dict()
    for key, tensor in paged.resident_tensors():
        assert tensor.dtype == name and np.array_equal(tensor.numpy().astype(np.float32), real[key].float().numpy())
    inner, _ = (dequantise(m) for m in decode(paged.read_record(1, 3), paged.index.geometry.shapes, 1, 3))
    wanted = real["model.layers.1.mlp.experts.gate_up_proj"][3].float().numpy()
    assert np.abs(inner - wanted).max() <= np.abs(wanted).max() / 127


def test_threads_change_no_byte(checkpoints, tmp_path, monkeypatch):
    import export.experts.source as module

    for n, threads in enumerate((1, 3)):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << (17 - 9 * n))  # 4 rows at a time
        export_experts(checkpoints["mixtral"], tmp_path / f"{n}.refold", Options(4, name="m", threads=threads))
    assert (tmp_path / "0.refold").read_bytes() == (tmp_path / "1.refold").read_bytes()


def test_windows_lie_evenly_over_all_texts(checkpoints, tmp_path):
    checkpoint = Source.open(checkpoints["mixtral"]).checkpoint
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 1000)
    windows = windows_of(checkpoint, [tmp_path / "a", tmp_path / "b"], 9, 6)
    assert windows.ids.shape == (6, 10) and windows.ids[:, 0].tolist() == [97] * 3 + [98] * 3
    assert windows.digest != Windows(windows.ids[:5]).digest and windows.predicted == 54
