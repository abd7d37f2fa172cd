"""Rows of trained and random models: equal tokens, equal bytes, perplexities; and the pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench.experts import exact, quality
from bench.experts.benchmark import _chosen, _noted
from bench.experts.checkpoint import Words
from bench.experts.informed import _chance
from bench.experts.lines import OURS, plan
from bench.experts.plots import plot
from bench.experts.replayed import clairvoyant, curves
from bench.experts.rows import COLUMNS
from bench.experts.shape import QUICK, Shape
from bench.experts.trace import Text, belady, routing
from bench.result import Options, Result
from refold.errors import UsageError

TINY = Shape("tiny", layers=2, experts=8, top_k=2, hidden=256, intermediate=32, heads=2, tokens=160)


def test_the_fewest_equal_tokens_are_claimed():
    held = exact.claims([{"engine": "a", "same": 256}, {"engine": "b", "same": 255}], 256)
    assert held[0].value == 255 and not held[0].holds
    assert exact.claims([{"engine": "a", "same": 256}], 256)[0].holds
    assert not exact.claims([{"engine": "a", "same": 256}, {"engine": "b", "note": "failed"}], 256)[0].holds


def test_mixed_bits_are_judged_at_equal_bytes():
    four = {"engine": "tiny_mixtral: 4 bits", "record bytes": 1000, "perplexity, A": 5.0, "perplexity, B": 4.0}
    mixed = {"engine": "tiny_mixtral: mixed, bytes of 4 bits", "record bytes": 990, "perplexity, A": 4.9, "perplexity, B": 4.1}
    held = {c.id: c.holds for c in quality.bits_claims([four, mixed])}
    assert held == {"experts.bits.bytes": True, "experts.bits.A": True, "experts.bits.B": False}
    assert quality.bits_claims([four]) == []


def test_factor_claims():
    before, after = {1: 9.0, 2: 5.0, 4: 3.5}, {1: 8.0, 2: 5.1, 4: 3.5}
    held = {c.id: c.holds for c in quality.factor_claims(1.00002, before, after, 4)}
    assert held == {"experts.factor.whole": True, "experts.factor.1": True, "experts.factor.2": False}
    for wrong in (1.01, 0.99):  # better than the dense model is another model too
        assert not quality.factor_claims(wrong, before, after, 4)[0].holds


def test_random_checkpoints_are_every_family(tmp_path):
    assert len(exact.FAMILIES) == 8
    folder = exact.random_checkpoint("olmoe", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "olmoe" and (folder / "model.safetensors").is_file()


def test_without_data_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("REFOLD_DATA", raising=False)
    rows, claims = quality.measured(tmp_path, Options(quick=True, only=("bits", "factor")))
    assert claims == [] and [r["note"] for r in rows] == ["skipped: REFOLD_DATA is not set"] * 2


def test_lines_are_chosen_by_name():
    chosen, _ = _chosen(plan(QUICK, True), Options(quick=True, only=("mmap",)))
    assert {line.name for line in chosen.lines} == {"mmap, our kernels"}
    assert _chosen(plan(QUICK, True), Options(quick=True, only=("exact",)))[0].lines == ()
    with pytest.raises(UsageError, match="there are refold, all in memory"):
        _chosen(plan(QUICK, True), Options(only=("vllm",)))


def test_llama_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr("bench.experts.benchmark.available", lambda: "not installed")
    chosen, skipped = _chosen(plan(QUICK, True), Options(quick=True))
    assert skipped["llama.cpp"] == "not installed" and all(line.kind != "llama" for line in chosen.lines)


def test_replay_puts_belady_on_top():
    found = curves(Words.of(TINY), quick=True)
    for slots in {r["slots"] for r in found}:
        at = {r["policy"]: r["hit"] for r in found if r["slots"] == slots}
        assert {"belady", "informed", "value", "lru", "edgemoe"} <= set(at) and max(at.values()) == at["belady"]


def test_who_is_told_what_a_trace_is_drawn_from_beats_every_policy_that_guesses():
    """Larger than TINY: there, a token's luck hides the rest."""
    found = curves(Words.of(QUICK), quick=True)
    for slots in {r["slots"] for r in found}:
        at = {r["policy"]: float(r["hit"]) for r in found if r["slots"] == slots}
        belady, informed = at.pop("belady"), at.pop("informed")
        assert max(at.values()) < informed < belady


def test_chances_are_the_shares_of_what_comes():
    """Of 2,000 tokens, those that gave an expert a chance of about p used it about that often."""
    text, told, used = Text(2, 16, 7), [], []
    for _ in range(2000):
        told.append(_chance(*text.outlook(1), 4))
        score = text.token()
        used.append(score >= np.sort(score, axis=1)[:, -4:-3])
    chance, share = np.array(told), np.array(used)
    for low in np.arange(0.05, 0.9, 0.1):
        there = (chance >= low) & (chance < low + 0.1)
        assert there.sum() > 300 and abs(share[there].mean() - chance[there].mean()) < 0.05


def test_the_clairvoyant_of_one_layer_is_ours():
    """Two programs, one rule: with one layer and its top 1 nothing distinguishes them."""
    shape = Shape("one", layers=1, experts=12, top_k=1, hidden=64, intermediate=32, heads=2, tokens=1)
    trace = routing(1, 12, 1, 200, seed=3)
    for slots in (3, 6):
        assert clairvoyant(trace, shape, slots, 0) == pytest.approx(belady(trace, slots))


def test_notes_and_pictures(tmp_path):
    row = _noted({"engine": "verify", "bits": 4, "top-k equal": 1.0})
    assert row["note"] == "top-k equal 1.0"
    speed = {"engine": OURS, "cap %": 25.0, "bits": 4, "tokens/s": 3.0, "cap MB": 900.0, "slots": 9, "hit": 0.5}
    rows = [speed | {"stall ms": 100.0, "compute ms": 250.0}, speed | {"engine": "long run, 10 minutes"}, row]
    result = Result("experts", rows, [], COLUMNS, {"replay": curves(Words.of(TINY), quick=True)})
    plot(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert np.isfinite(len(result.encode()))
