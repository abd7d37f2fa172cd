"""What bits and factors do to trained models: mixed bits against uniform ones of equal bytes; a dense model cut into experts.

Bits are chosen on what the model was trained on and judged on what neither training nor choice has seen: the last tenth of
tinyshakespeare, and WikiText-2's test text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.experts import exact
from bench.result import Cell, Claim, Options, number
from demo.images import data_folder
from refold.errors import RefoldError

__all__ = ["PARTS", "bits_claims", "factor_claims", "measured", "perplexity"]

PARTS = ("exact", "bits", "factor")
LENGTH = 128  # tokens of a window
Rows = list[dict[str, Cell]]


def measured(folder: Path, options: Options, say: Callable[[str], None] = lambda what: None) -> tuple[Rows, list[Claim]]:
    """Rows and claims of exactness, bits and factors."""
    rows: Rows = []
    claims: list[Claim] = []
    data = data_folder()
    lm = None if data is None else data / "lm"
    for name, part in zip(PARTS, (_exact, _bits, _factor), strict=True):
        if not options.wants(name):
            continue
        try:
            more, held = part(folder, lm, options.quick, say)
        except (ImportError, RefoldError) as e:
            more, held = [{"engine": name, "note": f"skipped: {getattr(e, 'message', e)}"}], []
        rows += more
        claims += held
    return rows, claims


def _export(checkpoint: Path, out: Path, **how: object) -> object:
    from export.experts.pipeline import Options as Export
    from export.experts.pipeline import export_experts

    return export_experts(checkpoint, out, Export(**how))  # type: ignore[arg-type]


def _exact(folder: Path, lm: Path | None, quick: bool, say: Callable[[str], None]) -> tuple[Rows, list[Claim]]:
    tokens, rows = (32 if quick else 256), list[dict[str, Cell]]()
    names = ["olmoe", "switch_transformers"] if quick else list(exact.FAMILIES)
    for name in [*names, *([] if lm is None else ["trained"])]:
        say(f"exactness, {name}")
        if name == "trained":
            assert lm is not None
            checkpoint = lm / "tiny_mixtral"
        else:
            checkpoint = exact.random_checkpoint(name, folder / f"random-{name}")
        out = folder / f"exact-{name}.refold"
        _export(checkpoint, out, bits=8)
        rows.append(exact.row(name, out, tokens))
    return rows, exact.claims(rows, tokens)


def _bits(folder: Path, lm: Path | None, quick: bool, say: Callable[[str], None]) -> tuple[Rows, list[Claim]]:
    from refold.experts.paged import PagedModel

    if lm is None:
        return [{"engine": "bits", "note": "skipped: REFOLD_DATA is not set"}], []
    whole = (lm / "tinyshakespeare.txt").read_bytes()
    cut = len(whole) * 9 // 10
    text = folder / "calibration.txt"
    text.write_bytes(whole[:cut] + (lm / "wikitext2_valid.txt").read_bytes())
    held = {"Shakespeare": whole[cut:], "WikiText": (lm / "wikitext2_test.txt").read_bytes()[:200_000]}
    windows, checked = (8, 8) if quick else (128, 512)
    how = {"texts": (text,), "windows": windows, "length": LENGTH}
    rows: Rows = []
    sizes: dict[str, int] = {}
    for name, options in (
        ("8 bits", {"bits": 8}),
        ("4 bits", {"bits": 4}),
        ("mixed, bytes of 4 bits", {"bits": "mixed", **how}),
        ("mixed, +1 % perplexity", {"bits": "mixed", "tolerance": 0.01, **how}),
    ):
        say(f"tiny_mixtral, {name}")
        if "bytes" in name:
            options = options | {"size": sizes["4 bits"]}
        out = folder / f"bits-{len(rows)}.refold"
        told = _export(lm / "tiny_mixtral", out, **options)
        sizes[name] = PagedModel.open(out).index.total
        row: dict[str, Cell] = {"engine": f"tiny_mixtral: {name}", "record bytes": sizes[name], **_searched(told)}
        for title, content in held.items():
            row[f"perplexity, {title}"] = round(perplexity(out, content, checked), 4)
        rows.append(row)
    return rows, bits_claims(rows)


def _searched(told: object) -> dict[str, Cell]:
    """EdgeMoE's procedure beside ours: evaluations of the loss and what they ended at."""
    searched = getattr(told, "searched", None)
    if searched is None:
        return {}
    row: dict[str, Cell] = {"evaluations": searched.evaluations, "taken": searched.taken, "walk of EdgeMoE": str(searched.walk)}
    for o in searched.outcomes:
        row |= {
            f"{o.name}: evaluations": o.evaluations,
            f"{o.name}: bytes": searched.costs.total(o.plan),
            f"{o.name}: loss": round(o.loss, 5),
        }
    return row


def bits_claims(rows: Rows) -> list[Claim]:
    """Mixed bits are better than uniform ones of as many bytes, on texts that neither has seen."""
    by_name = {str(r["engine"]).partition(": ")[2]: r for r in rows}
    four, mixed = by_name.get("4 bits"), by_name.get("mixed, bytes of 4 bits")
    if four is None or mixed is None:
        return []
    out = [
        Claim(
            "experts.bits.bytes",
            "mixed: bytes ÷ 4 bits'",
            round(number(mixed["record bytes"]) / number(four["record bytes"]), 4),
            "≤",
            1.0,
        )
    ]
    for key in (k for k in four if k.startswith("perplexity, ")):
        ratio = round(number(mixed[key]) / number(four[key]), 5)
        title = key.partition(", ")[2]
        out.append(Claim(f"experts.bits.{title}", f"mixed bits: perplexity ÷ 4 bits', {title}, equal bytes", ratio, "≤", 1.0))
    return out


def perplexity(bundle: Path, text: bytes, windows: int) -> float:
    """Of the paged model itself, bytes as tokens, over so many windows spread evenly; all experts in memory."""
    import torch

    from edge.experts.model import Settings, load

    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    starts = np.unique(np.linspace(0, len(ids) - LENGTH - 1, min(windows, len(ids) // LENGTH)).astype(int))
    total = 0.0
    with load(bundle, Settings(memory=exact.budget(bundle, 1.0), lookahead=False)) as running, torch.inference_mode():
        for at in starts:
            piece = torch.from_numpy(ids[at : at + LENGTH + 1].copy())
            logits = running.model(input_ids=piece[None, :-1], use_cache=False).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, piece[1:]))
            running.pager.token()
    return math.exp(total / len(starts))


def _factor(folder: Path, lm: Path | None, quick: bool, say: Callable[[str], None]) -> tuple[Rows, list[Claim]]:
    if lm is None:
        return [{"engine": "factor", "note": "skipped: REFOLD_DATA is not set"}], []
    from export.experts.factor import Factoring, factor
    from export.experts.factor_router import RouterSettings

    say("stories260K, cut into 4 experts a layer")
    sample = lm / "tinystories_sample.txt"
    how = Factoring(4, 2, measured=(sample,))
    if quick:
        how = replace(how, windows=8, router=RouterSettings(steps=10))
    told = factor(
        lm / "stories260K.bin", folder / "factored", how, lambda what, steps: say(f"stories260K, {what}"), lambda n: None
    )
    rows: Rows = [
        {"engine": f"stories260K: {k} of {told.experts} active", "perplexity, dense": round(told.dense, 4),
         "untrained routers": round(told.before[k], 4), "trained routers": round(told.after[k], 4)}
        for k in sorted(told.before)
    ]  # fmt: skip
    say("stories260K, all 4 experts active, as written")
    written = written_whole(lm / "stories260K.bin", folder / "factored-whole", sample)
    rows.append({"engine": "stories260K: 4 of 4 active, as written", "perplexity ÷ dense": round(written, 6)})
    return rows, factor_claims(written, told.before, told.after, told.experts)


def written_whole(source: Path, folder: Path, sample: Path) -> float:
    """Perplexity of the written mixture with all experts active ÷ that of the dense model, both loaded from their files by
    transformers: the mixture goes through routers and experts, which measuring while factoring does not do."""
    from export.experts.checkpoint import Checkpoint
    from export.experts.factor import Factoring, factor
    from export.experts.factor_router import RouterSettings
    from export.experts.tokens import windows_of

    how = Factoring(4, 4, measured=(sample,), windows=8, router=RouterSettings(steps=1))
    factor(source, folder, how, lambda what, steps: None, lambda n: None)
    ids = windows_of(Checkpoint.open(folder / "dense"), (sample,), LENGTH, 32).ids
    return math.exp(_loss(folder, ids) - _loss(folder / "dense", ids))


def _loss(folder: Path, ids: np.ndarray) -> float:
    """Nats a token of a checkpoint by transformers' own model class."""
    import torch
    from transformers import AutoModelForCausalLM

    # transformers' default experts, grouped_mm, refuse experts whose width is no multiple of 4
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    some = torch.from_numpy(ids)
    with torch.inference_mode():
        logits = model(some[:, :-1], use_cache=False).logits
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten()))


def factor_claims(written: float, before: Mapping[int, float], after: Mapping[int, float], experts: int) -> list[Claim]:
    """All active is the dense model, as written and loaded again; with fewer, trained routers lose less than untrained ones."""
    whole = "factor: perplexity ÷ the dense model's, all active, as written and loaded again"
    out = [Claim("experts.factor.whole", whole, round(abs(written - 1), 6) + 1, "≤", 1.0001)]
    for k in sorted(set(before) - {experts}):
        text = f"factor: perplexity ÷ untrained routers', {k} of {experts} active"
        out.append(Claim(f"experts.factor.{k}", text, round(after[k] / before[k], 5), "≤", 1.0))
    return out
