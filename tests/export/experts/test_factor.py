"""A dense Llama cut into experts: exactness, what transformers then computes, the losses, llama2.c's files, bad input."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.experts import factor_router as routers
from export.experts.factor import Factored, Factoring, factor
from export.experts.factor_cluster import balanced, reorder
from export.experts.factor_llama2c import convert_llama2c, tokenizer_json
from export.experts.factor_router import RouterSettings
from export.experts.source import Source
from refold.errors import InputError, ModelError, UsageError
from refold.experts import PagedModel

transformers = pytest.importorskip("transformers")
FEW = RouterSettings(steps=20)


def quiet(*_: Any) -> None:
    return None


def tiny(folder: Path, **changes: Any) -> Any:
    """A random Llama of 256 bytes, saved; with weights large enough that a wrong expert shows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, **changes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("dense")
    return folder, tiny(folder)


def how(active: int, experts: int = 4, scaling: str = "sum", split: str = "slices") -> Factoring:
    return Factoring(experts, active, scaling, split, windows=8, length=16, router=FEW)


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    # transformers' default, grouped_mm, refuses experts whose width is no multiple of 4.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    assert type(model).__name__ == "GraniteMoeForCausalLM"
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_with_all_active_transformers_computes_the_dense_model(dense: tuple[Path, Any], tmp_path: Path, experts: int) -> None:
    told = factor(dense[0], tmp_path, how(experts, experts), quiet, quiet)
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        wanted = dense[1](ids).logits
    apart = (logits(tmp_path, ids) - wanted).abs().max() / wanted.abs().max()
    assert float(apart) < 1e-5
    assert told.after[experts] == pytest.approx(told.dense, rel=1e-5)


@pytest.mark.parametrize(("scaling", "scale"), [("sum", 1.0), ("paper", 2.0)])
@pytest.mark.parametrize("split", ["slices", "clusters"])
def test_with_some_active_transformers_computes_the_formula(
    dense: tuple[Path, Any], tmp_path: Path, scaling: str, scale: float, split: str
) -> None:
    factor(dense[0], tmp_path, how(2, scaling=scaling, split=split), quiet, quiet)
    source = Source.open(tmp_path)
    ids = torch.arange(60).reshape(2, 30)
    model = transformers.LlamaForCausalLM.from_pretrained(dense[0], dtype=torch.float32).eval()
    seats = routers.seat(model, 4, 0)
    for layer, s in enumerate(seats):
        name = f"model.layers.{layer}.block_sparse_moe.router.layer.weight"
        s.router = torch.from_numpy(source.checkpoint.read(name).numpy() * np.float32(2.0**60))
        s.active, s.scale = 2, scale
        reorder(s, _order(source, layer, s))
    with torch.no_grad():
        wanted = model(ids).logits
    apart = (logits(tmp_path, ids) - wanted).abs().max() / wanted.abs().max()
    assert float(apart) < 1e-5
    with torch.no_grad():
        assert float((wanted - dense[1](ids).logits).abs().max()) > 1e-2  # two of four are not the dense model
    assert (source.geometry.experts, source.geometry.top_k, source.geometry.intermediate) == (4, 2, 18)


def _order(source: Source, layer: int, s: routers.FactoredMlp) -> torch.Tensor:
    """Where each row of the written gates lay in the dense feed-forward."""
    gates = np.concatenate([source.weights(layer, e)[0][:18] for e in range(4)])
    at = {row.tobytes(): i for i, row in enumerate(s.gate_proj.weight.detach().numpy())}
    order = torch.tensor([at[row.tobytes()] for row in gates])
    assert sorted(order.tolist()) == list(range(72))
    return order


def test_neurons_that_are_active_together_become_one_expert() -> None:
    rng = torch.Generator().manual_seed(3)
    centres = torch.randn(4, 50, generator=rng)
    kind = torch.arange(48) % 4
    points = torch.nn.functional.normalize(centres[kind] + 0.1 * torch.randn(48, 50, generator=rng), dim=1)
    groups = kind[balanced(points, 4, 0)].reshape(4, 12)
    assert all(len(set(g.tolist())) == 1 for g in groups)
    assert sorted(balanced(points[:, :1] * 0 + 1, 4, 0).tolist()) == list(range(48))  # alike, and still of equal sizes


def test_it_is_not_done_twice_and_done_again_for_other_settings(dense: tuple[Path, Any], tmp_path: Path) -> None:
    first = factor(dense[0], tmp_path, how(2), quiet, quiet)
    config = tmp_path / "config.json"
    written = config.stat().st_mtime_ns
    assert factor(dense[0], tmp_path, how(2), quiet, quiet) == first and config.stat().st_mtime_ns == written
    (tmp_path / "factored.json").write_text("{")
    assert factor(dense[0], tmp_path, how(2), quiet, quiet) == first
    factor(dense[0], tmp_path, how(1), quiet, quiet)
    assert json.loads(config.read_text())["num_experts_per_tok"] == 1


def test_errors_of_a_lesson_are_those_of_each_expert_alone(dense: tuple[Path, Any]) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(dense[0], dtype=torch.float32).eval().requires_grad_(False)
    seats = routers.seat(model, 4, 0)
    mlp = seats[0]
    x = torch.randn(5, 32)
    mlp.lessons = []
    whole = mlp(x)
    h = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    each = [h[:, j * 18 : (j + 1) * 18] @ mlp.down_proj.weight[:, j * 18 : (j + 1) * 18].T for j in range(4)]
    for k in (1, 2, 3):
        wanted = torch.stack([(e - whole * k / 4).square().mean(1) for e in each], 1)
        assert torch.allclose(mlp.lessons[0].errors(k / 4), wanted, rtol=1e-3, atol=1e-5)


def test_losses_are_their_formulae() -> None:
    scores, errors = torch.tensor([[2.0, 0.0, -1.0, 1.0]]), torch.tensor([[0.3, 0.1, 0.2, 0.9]])
    p = np.exp(scores.numpy()[0])
    p /= p.sum()
    label = np.array([0.0, 1.0, 1.0, 0.0])
    q = np.exp(label) / np.exp(label).sum()
    twice = np.exp(p) / np.exp(p).sum()
    prior, balance = routers.losses(scores, errors, 2)
    assert float(prior) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert float(balance) == pytest.approx(float((twice * [1, 0, 0, 1]).mean()), rel=1e-5)


def test_both_losses_do_what_they_are_for() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 16)
    teacher = torch.randn(4, 16)
    square = (x @ teacher.T).exp()
    lesson = routers.Lesson(x.half(), square, torch.zeros_like(square), torch.zeros(2000, 1))
    start = 0.02 * torch.randn(4, 16)
    agreed = [routers.train(start, lesson, 2, 2.0, RouterSettings(steps=n))[1].agreed for n in (0, 200)]
    assert agreed[0] < 0.7 and agreed[1] > 0.9
    alone = RouterSettings(steps=100, prior=0.0, balance=1.0)
    certain = 0.5 * torch.randn(4, 16)
    after = routers.train(certain, lesson, 2, 2.0, alone)[0]
    sure = [float((x @ r.T).softmax(-1).amax(-1).mean()) for r in (certain, after)]
    assert sure[1] < sure[0] - 0.01  # the balance loss takes certainty from what is chosen; twice a softmax, it does so slowly


def llama2c(path: Path, model: Any) -> None:
    """The tiny model as llama2.c would write it: rows of a head in pairs, not in halves."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}

    def pairs(w: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
        rows, columns = w.shape
        return w.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    def every(name: str) -> list[np.ndarray[Any, Any]]:
        return [state[f"model.layers.{i}.{name}.weight"] for i in range(2)]

    parts = [state["model.embed_tokens.weight"], *every("input_layernorm")]
    parts += [pairs(w, 4) for w in every("self_attn.q_proj")] + [pairs(w, 2) for w in every("self_attn.k_proj")]
    parts += every("self_attn.v_proj") + every("self_attn.o_proj") + every("post_attention_layernorm")
    parts += every("mlp.gate_proj") + every("mlp.down_proj") + every("mlp.up_proj") + [state["model.norm.weight"]]
    parts += [np.zeros((64, 4)), np.zeros((64, 4)), state["lm_head.weight"]]
    header = struct.pack("<7i", 32, 72, 2, 4, 2, -256, 64)
    path.write_bytes(header + b"".join(np.asarray(p, "<f4").tobytes() for p in parts))


def test_a_llama2c_file_is_the_model_it_was_written_from(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    model = tiny(tmp_path / "dense", rms_norm_eps=1e-5)
    llama2c(tmp_path / "m.bin", model)
    (tmp_path / "out").mkdir()
    convert_llama2c(tmp_path / "m.bin", tmp_path / "out")
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_vocabulary_merges_by_score(tmp_path: Path) -> None:
    pieces = [(0.0, b"<unk>"), (0.0, b"<s>"), (0.0, b"</s>"), *((0.0, f"<0x{i:02X}>".encode()) for i in range(256))]
    pieces += [(-1.0, b"ab"), (-2.0, b"bc"), (-3.0, b" "), (-4.0, b"a"), (-5.0, b"b"), (-6.0, b"c")]
    path = tmp_path / "tok.bin"
    path.write_bytes(struct.pack("<i", 6) + b"".join(struct.pack("<fi", s, len(p)) + p for s, p in pieces))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(path, len(pieces))))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer("abc")["input_ids"] == [1, 261, 259, 264]  # "ab" before "bc", a space in front
    assert tokenizer("é")["input_ids"] == [1, 261, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([261, 259, 264, 3 + 0xC3, 3 + 0xA9]) == "abcé"
    with pytest.raises(InputError, match="vocabulary"):
        tokenizer_json(path, len(pieces) + 1)


@pytest.mark.parametrize(("cut", "said"), [(-4, "header asks for"), (10, "version 0"), (0, "version 0")])
def test_a_broken_llama2c_file_is_told(tmp_path: Path, cut: int, said: str) -> None:
    llama2c(tmp_path / "m.bin", tiny(tmp_path / "dense", rms_norm_eps=1e-5))
    content = (tmp_path / "m.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(content[:cut])
    with pytest.raises(InputError, match=said):
        factor(tmp_path / "m.bin", tmp_path / "out", how(2), quiet, quiet)
    (tmp_path / "m.bin").write_bytes(content[:28] + struct.pack("<f", float("nan")) + content[32:])
    with pytest.raises(InputError, match="NaN"):
        factor(tmp_path / "m.bin", tmp_path / "out", how(2), quiet, quiet)


def test_what_cannot_be_cut_is_told(dense: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="72 cannot be cut into 5 equal experts; --factor may be 2, 3, 4"):
        factor(dense[0], tmp_path / "out", how(2, 5), quiet, quiet)
    assert not (tmp_path / "out").exists()
    for name, value, said in (
        ("model_type", "gpt2", "'gpt2'"),
        ("mlp_bias", True, "biases"),
        ("quantization_config", {"a": 1}, "quantised"),
    ):
        other = tmp_path / name
        other.mkdir()
        (other / "model.safetensors").write_bytes((dense[0] / "model.safetensors").read_bytes())
        (other / "config.json").write_text(json.dumps(json.loads((dense[0] / "config.json").read_text()) | {name: value}))
        with pytest.raises(ModelError, match=said):
            factor(other, tmp_path / "out", how(2), quiet, quiet)
    for wrong in (
        {"experts": 1, "active": 1},
        {"experts": 4, "active": 5},
        {"experts": 4, "active": 0},
        {"experts": 4, "active": 2, "scaling": "x"},
    ):
        with pytest.raises(UsageError):
            Factoring(**wrong)
    with pytest.raises(UsageError):
        RouterSettings(prior=0, balance=0)


def test_what_is_told_survives_its_file() -> None:
    told = Factored(4, 2, "t", 9, 1.5, {1: 3.0, 4: 1.5}, {1: 2.0, 4: 1.5}, [routers.Shares((0.5, 0.5), 0.9)])
    assert Factored.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert "1 of 4 active: 3.000 with untrained routers, 2.000 with trained" in "\n".join(told.lines())


def test_the_command_makes_a_bundle_and_tells_what_it_costs(dense: tuple[Path, Any], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from export.experts.cli import experts

    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    output = tmp_path / "m.refold"
    asked = [str(dense[0]), "-o", str(output), "--factor", "4", "--active", "2", "--router-steps", "5"]
    read = ["--router-text", str(tmp_path / "text"), "--text", str(tmp_path / "text"), "--window", "32"]
    done = CliRunner().invoke(experts, [*asked, *read, "--bits", "8", "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert set(told["factored"]["after"]) == {"1", "2", "4"} and told["factored"]["active"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.refold", "text"]
    paged = PagedModel.open(output)
    geometry = paged.index.geometry
    assert (geometry.family, geometry.experts, geometry.top_k) == ("granitemoe", 4, 2)
    with pytest.raises(UsageError, match="belong to --factor"):
        CliRunner().invoke(experts, [str(dense[0]), "-o", str(output), "--active", "2"], catch_exceptions=False)
