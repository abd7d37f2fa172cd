"""The whole way: bits chosen within a bound, killed and gone on with, and everything that is wrong with a checkpoint."""

from __future__ import annotations

import fcntl
import json
import resource
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny_families
from safetensors.numpy import load_file, save_file
from small_disk import SmallDisk

import export.experts.pipeline as pipeline
from export.experts.measure import Measure
from export.experts.pipeline import Options, export_experts
from export.experts.source import Source
from export.experts.tokens import windows_of
from refold.cli import main
from refold.errors import InputError, ModelError, StorageError, UsageError
from refold.experts import PagedModel, PagedWriter

MIXED = {"windows": 3, "length": 32}


def options(text: Path, **more: object) -> Options:
    return Options("mixed", texts=[text], **{**MIXED, **more})  # type: ignore[arg-type]


def broken(folder: Path, to: Path, change: dict[str, object]) -> Path:
    """A copy with tensors replaced, or (None) left out."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, to / "model.safetensors")
    return to


def test_the_tolerance_is_kept_and_every_procedure_reported(checkpoints, tmp_path, text):
    told = export_experts(
        checkpoints["mixtral"], tmp_path / "m.refold", options(text, tolerance=0.02), picture=tmp_path / "m.bits.png"
    )
    assert told.perplexity <= told.before * 1.02 + 1e-9
    s = told.searched
    assert {o.name for o in s.outcomes} == {"edgemoe", "reads", "widths"}
    assert all(np.exp(o.loss) <= told.before * 1.02 + 1e-9 for o in s.outcomes)
    assert told.record_bytes == min(s.costs.total(o.plan) for o in s.outcomes)
    assert (tmp_path / "m.bits.png").read_bytes().startswith(b"\x89PNG")
    paged = PagedModel.open(told.path)
    paged.verify()
    assert {k: r.bits for k, r in paged.index.records.items()} == told.plan
    assert paged.index.frequency == {k: f for k, f in told.frequency.items() if f}
    assert paged.bundle.manifest.experts.measured["perplexity"] == told.perplexity
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bits.png", "m.refold", "text.txt"]


@pytest.mark.parametrize("by", ["loss", "output"])
def test_a_size_is_kept(checkpoints, tmp_path, text, by):
    even = export_experts(checkpoints["qwen3_moe"], tmp_path / "even.refold", Options(4)).record_bytes
    told = export_experts(checkpoints["qwen3_moe"], tmp_path / "m.refold", options(text, size=even, importance=by))
    s = told.searched
    assert told.record_bytes <= even and told.perplexity <= np.exp(s.uniform[4]) + 1e-9
    assert s.found.evaluations == (2 * 2 + 2 if by == "output" else 2 * sum(f > 0 for f in told.frequency.values()) + 1)
    with pytest.raises(UsageError, match="at 2 bits"):
        export_experts(checkpoints["qwen3_moe"], tmp_path / "n.refold", options(text, size=100))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["even.refold", "m.refold", "text.txt"]


def test_output_errors_grow_as_bits_fall(checkpoints, text):
    source = Source.open(checkpoints["switch_transformers"])
    work = pipeline.Work(text.with_name("x"), {})
    with work:
        run = pipeline._Run(source, Options(), work, pipeline.Watcher())
        for b in (2, 4, 8):
            run.quantise(b).close()
        measure = Measure(source, run.variants, windows_of(source.checkpoint, [text], 32, 3), 1 << 20, lambda _: None)
        errors = measure.output_errors((2, 4, 8))
    used = [e for e in errors.values() if e[2]]
    assert used and all(e[2] > e[4] > e[8] > 0 for e in used)


def test_the_trained_model_gains_by_mixing(lm_data, tmp_path):
    """At the bytes of uniform 4 bits; on text it was not calibrated on."""
    even = Options(4, texts=[lm_data / "wikitext2_valid.txt"], windows=8)
    four = export_experts(lm_data / "tiny_mixtral", tmp_path / "four.refold", even)
    mixed = Options("mixed", texts=[lm_data / "wikitext2_valid.txt"], windows=24, size=four.record_bytes, importance="output")
    told = export_experts(lm_data / "tiny_mixtral", tmp_path / "m.refold", mixed)
    assert told.record_bytes <= four.record_bytes
    source = Source.open(lm_data / "tiny_mixtral")
    assert 3.5 < told.before < 4.6  # README: 1.448 nats a byte
    assert told.perplexity < np.exp(told.searched.uniform[4])
    assert len(set(told.plan.values())) > 1 and source.geometry.group == 32


KILLED = """
import os, signal, sys
import transformers
transformers.MixtralForCausalLM, transformers.MixtralConfig, transformers.AutoConfig  # before any fork
from pathlib import Path
import torch
torch.set_num_threads(1)
from export.experts.pipeline import Options, export_experts
from export.experts.work import Work
from refold.experts import PagedWriter
folder, output, text = map(Path, sys.argv[1:4])
def dying(real, after):
    calls = []
    def call(self, *a):
        calls.append(a)
        if len(calls) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *a)
    return call
mixed = Options("mixed", texts=[text], windows=3, length=32, tolerance=0.02)
for method, owner, after, options in (
    ("append", PagedWriter, 5, Options(4)),
    ("finish", PagedWriter, 0, Options(4)),
    ("append", PagedWriter, 11, mixed),
    ("note", Work, 6, mixed),
    ("publish", Work, 0, mixed),
):
    child = os.fork()
    if child == 0:
        setattr(owner, method, dying(getattr(owner, method), after))
        name = "mixed" if options is mixed else "four"
        export_experts(folder, output / f"{name}.refold", options)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, (method, after)
    assert not list(output.glob("*.refold")), "half a bundle"
"""


def test_a_killed_export_goes_on_to_the_same_bytes(checkpoints, tmp_path, text):
    """Killed while quantising, while finishing, in the search and just before the end; each time gone on with."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    program = [sys.executable, "-W", "ignore", "-c", KILLED, str(checkpoints["mixtral"]), str(tmp_path / "killed"), str(text)]
    subprocess.run(program, check=True, cwd=Path(__file__).parents[3], timeout=280)
    both = {"four": Options(4), "mixed": options(text, tolerance=0.02)}
    for name, wanted in both.items():
        journal = tmp_path / "killed" / f".{name}.refold.work"
        assert journal.is_dir()
        again = export_experts(checkpoints["mixtral"], tmp_path / "killed" / f"{name}.refold", wanted)
        export_experts(checkpoints["mixtral"], tmp_path / "whole" / f"{name}.refold", wanted)
        assert not journal.exists()
        assert again.path.read_bytes() == (tmp_path / "whole" / f"{name}.refold").read_bytes()
    assert again.searched.resumed > 5


def test_another_checkpoint_starts_anew(checkpoints, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "m.refold"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(PagedWriter, "finish", killed)
        export_experts(checkpoints["olmoe"], output, Options(4))
    assert (tmp_path / ".m.refold.work" / "4.records").is_file() and not output.exists()
    export_experts(checkpoints["qwen3_moe"], output, Options(4))
    assert PagedModel.open(output).index.geometry.family == "qwen3_moe"
    assert list(tmp_path.iterdir()) == [output]


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
BAD = {
    "missing expert": ({GATE: None}, f"lacks {GATE}"),
    "missing resident": ({"model.norm.weight": None}, "lacks model.norm.weight"),
    "missing layer": ({f"model.layers.0.mlp.experts.{e}.{m}_proj.weight": None for e in range(4)
                       for m in ("gate", "up", "down")}, "lacks model.layers.0.mlp.experts.0.gate_proj.weight"),
    "misshapen expert": ({GATE: lambda t: t[:-1]}, f"{GATE} has shape 95 x 64 where config.json asks for 96 x 64"),
    "misshapen resident": ({"model.norm.weight": np.ones(31, np.float32)}, "model.norm.weight has shape 31 "),
    "NaN in an expert": ({GATE: lambda t: t * np.float32("nan")}, f"{GATE} holds infinite numbers or NaN"),
    "infinite embedding": ({"lm_head.weight": lambda t: t + np.float32("inf")}, "lm_head.weight holds infinite"),
    "integers": ({GATE: lambda t: t.astype(np.int8)}, f"{GATE} is I8: experts are floating point"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BAD))
def test_bad_tensors_are_one_sentence(checkpoints, tmp_path, capsys, what):
    change, sentence = BAD[what]
    folder = broken(checkpoints["olmoe"], tmp_path / "bad", change)
    with pytest.raises(SystemExit) as stop:
        main(["export", "experts", str(folder), "-o", str(tmp_path / "m.refold")])
    assert stop.value.code == 3 and sentence in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def edited(folder: Path, to: Path, **values: object) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | values))
    return to


def test_bad_folders_are_one_sentence(checkpoints, tmp_path):
    olmoe, out = checkpoints["olmoe"], tmp_path / "out"
    out.mkdir()

    def refused(kind, sentence, folder, given=None):
        with pytest.raises(kind, match=sentence) as e:
            export_experts(folder, out / "m.refold", given or Options())
        assert not list(out.iterdir())
        return e.value.code

    assert refused(ModelError, "type 'llama' are not supported", edited(olmoe, tmp_path / "a", model_type="llama")) == (
        "unsupported-architecture"
    )
    refused(ModelError, "quantised already", edited(olmoe, tmp_path / "b", quantization_config={"quant_method": "fp8"}))
    refused(InputError, "uses 9 of 4 experts", edited(olmoe, tmp_path / "c", num_experts_per_tok=9))
    refused(InputError, "no folder", tmp_path / "nowhere")
    refused(InputError, "config.json cannot be read", out)
    whole = (olmoe / "model.safetensors").read_bytes()
    for n, cut in enumerate((0, 5, 100, len(whole) // 2, len(whole) - 1)):
        folder = edited(olmoe, tmp_path / f"cut{n}")
        (folder / "model.safetensors").write_bytes(whole[:cut])
        refused(InputError, "truncated or not a safetensors", folder)
    folder = edited(olmoe, tmp_path / "torch")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(InputError, "only safetensors are read", folder)
    tiny_families.save("olmoe", tmp_path / "shards", max_shard_size="60KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    refused(InputError, f"{shard.name} is truncated", tmp_path / "shards")
    shard.unlink()
    refused(InputError, f"{shard.name} is missing", tmp_path / "shards")
    (folder / "config.json").write_text("{")
    refused(InputError, "is no JSON", folder)
    with pytest.raises(StorageError, match="no folder"):
        export_experts(olmoe, tmp_path / "no" / "m.refold", Options())


def test_texts_and_tokenizers_are_asked_for(checkpoints, tmp_path, text):
    wide = {"model.embed_tokens.weight": np.zeros((300, 64), np.float32), "lm_head.weight": np.zeros((300, 64), np.float32)}
    folder = broken(checkpoints["olmoe"], tmp_path / "wide", wide)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no tokenizer and its 300 tokens are not bytes"):
        export_experts(folder, tmp_path / "m.refold", Options(4, texts=[text]))
    told = export_experts(folder, tmp_path / "m.refold", Options(4))
    assert "no tokenizer" in told.warnings[0]
    (tmp_path / "short").write_text("short")
    for bad, sentence in ((tmp_path / "short", "fewer than 129 tokens"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(InputError, match=sentence):
            export_experts(checkpoints["olmoe"], tmp_path / "n.refold", Options(4, texts=[bad]))


def test_a_tokenizer_is_used_and_goes_along(checkpoints, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = edited(checkpoints["olmoe"], tmp_path / "words")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "text").write_text("one two three " * 20)
    checkpoint = Source.open(folder).checkpoint
    assert windows_of(checkpoint, [tmp_path / "text"], 5, 1).ids.tolist() == [[1, 2, 0, 1, 2, 0]]
    export_experts(folder, tmp_path / "m.refold", Options(4, texts=[tmp_path / "text"], length=8))
    paged = PagedModel.open(tmp_path / "m.refold")
    assert not paged.bytes_as_tokens and set(paged.tokenizer_files()) >= {"tokenizer.json", "tokenizer_config.json"}
    (tmp_path / "latin").write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(InputError, match="no UTF-8"):
        export_experts(folder, tmp_path / "n.refold", Options(4, texts=[tmp_path / "latin"]))


@pytest.mark.parametrize(
    "given",
    [{"bits": 3}, {"bits": "mixed"}, {"tolerance": 0.01}, {"size": 10}, {"bits": 4, "size": 10, "texts": ["t"]},
     {"bits": "mixed", "tolerance": 0.1, "size": 1, "texts": ["t"]}, {"bits": "mixed", "tolerance": -1.0, "texts": ["t"]},
     {"bits": "mixed", "texts": ["t"]}],
)  # fmt: skip
def test_options_that_contradict_are_refused(given):
    with pytest.raises(UsageError):
        Options(**given)


def test_a_full_disk_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    """Really: no file of this process may grow beyond 20 KiB."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 10, hard))
        with pytest.raises(StorageError, match="cannot be written") as e:
            export_experts(checkpoints["mixtral"], tmp_path / "m.refold", Options(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert e.value.exit_code == 7 and not list(tmp_path.iterdir())
    monkeypatch.setattr(pipeline.Work, "free", lambda _: 1000)
    with pytest.raises(StorageError, match="1,000 bytes free; this export needs"):
        export_experts(checkpoints["mixtral"], tmp_path / "m.refold", Options(4))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_a_search_keeps_what_was_measured(checkpoints, tmp_path, text, monkeypatch):
    def full(*_: object) -> None:
        raise StorageError("full")

    with monkeypatch.context() as m, pytest.raises(StorageError):
        m.setattr(PagedWriter, "finish", full)
        export_experts(checkpoints["mixtral"], tmp_path / "m.refold", options(text, tolerance=0.02))
    work = tmp_path / ".m.refold.work"
    assert sorted(p.name for p in work.iterdir()) == ["evaluations.jsonl", "settings.json"]
    told = export_experts(checkpoints["mixtral"], tmp_path / "m.refold", options(text, tolerance=0.02))
    assert told.searched.resumed == told.searched.evaluations and not work.exists()


def test_a_tolerance_that_cannot_be_met_is_said_and_what_was_measured_is_kept(checkpoints, tmp_path, text, monkeypatch):
    real = Measure.loss
    monkeypatch.setattr(Measure, "loss", lambda self, plan: real(self, plan) + 0.1 * (min(plan.values(), default=16) < 16))
    with pytest.raises(ModelError, match="At 8 bits perplexity rises by") as e:
        export_experts(checkpoints["mixtral"], tmp_path / "m.refold", options(text, tolerance=0.01))
    assert e.value.code == "tolerance" and not (tmp_path / "m.refold").exists()
    told = export_experts(checkpoints["mixtral"], tmp_path / "m.refold", options(text, tolerance=0.2))
    assert told.searched.resumed > 5 and told.perplexity > told.before


def test_two_exports_to_one_file_do_not_mix(checkpoints, tmp_path):
    work = tmp_path / ".m.refold.work"
    work.mkdir()
    with (work / "lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="Another export") as e:
            export_experts(checkpoints["mixtral"], tmp_path / "m.refold", Options(4))
        assert e.value.code == "busy" and work.is_dir()


def test_the_command_tells_a_person_and_a_machine(checkpoints, tmp_path, text, capsys):
    common = [str(checkpoints["mixtral"]), "--text", str(text), "--windows", "3", "--window", "32"]
    main(["export", "experts", *common, "-o", str(tmp_path / "m.refold"), "--max-perplexity-increase", "2%"])
    told = capsys.readouterr()
    for wanted in ("all at 4 bits", "edgemoe", "reads", "widths", "(taken)", "evaluations", "m.bits.png"):
        assert wanted in told.out
    assert "importance of each expert" in told.err
    assert (tmp_path / "m.bits.png").is_file()
    main(["export", "experts", *common, "-o", str(tmp_path / "n.refold"), "--size", "90KB", "--no-plot", "--json"])
    machine = json.loads(capsys.readouterr().out)
    assert machine["record_bytes"] <= 90_000 and set(machine["search"]["procedures"]) >= {"widths"}
    assert machine["bits"]["0.0"] in (2, 4, 8) and not (tmp_path / "n.bits.png").exists()


def test_memory_is_two_experts_and_the_resident_part(tmp_path):
    """Ten experts of 6 MB each (float32): 63 MB in all."""
    import torch
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=10,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "big")
    source = Source.open(tmp_path / "big")  # imports what it needs
    resident, expert = sum(t.size for t in source.resident), 4 * 3 * 512 * 1024
    tracemalloc.start()
    try:
        export_experts(tmp_path / "big", tmp_path / "m.refold", Options(8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * expert + resident + (8 << 20), peak


def test_the_error_of_a_read_only_disk_is_the_first_one(checkpoints, tmp_path):
    work = pipeline.Work(tmp_path / "m.refold", {})
    with pytest.raises(StorageError, match="the first reason"), work:
        work.note("plan", 1.0)
        (work.folder / "4.records").mkdir()  # cannot be unlinked
        raise StorageError("the first reason")
    with SmallDisk(tmp_path / "disk") as disk:
        disk.read_only(True)
        with pytest.raises(StorageError, match="Read-only"):
            export_experts(checkpoints["mixtral"], disk.root / "m.refold", Options(4))
