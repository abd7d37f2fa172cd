"""`--factor N`: a dense Llama becomes a mixture of N experts a layer, so that it can be paged (FactorLLM, arXiv 2408.11855).

    factor_llama2c.py   llama2.c's files as a Llama checkpoint
    factor_cluster.py   which neurons go together
    factor_router.py    the routers: what they learn, what the factored model loses
    factor.py           this: trains them, then writes the factored checkpoint tensor by tensor

The result is a Granite-MoE checkpoint (`GraniteMoeForCausalLM`), which transformers, the exporter and the device know already,
and whose arithmetic can be made FactorLLM's exactly:

* Granite takes the k largest router outputs and weights them by a softmax over those k alone. Router rows are stored times
  2^-60: the order stays, every exponential rounds to one, and each weight is exactly 1 / k. Down projections are stored times
  k * scale, so that the output is scale * sum of the k experts. Mixtral, OLMoE and others softmax over all experts before they
  choose: all would tie.
* Granite is a Llama but for four factors: those of embedding, residual and logits are 1, and that of attention 1 / sqrt(head).
* Granite's router has no bias, FactorLLM's has: a constant preference, which the balance loss works against.

With all N active the sum is the dense feed-forward, whatever the router says.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.experts import factor_cluster, factor_router
from export.experts.checkpoint import Checkpoint
from export.experts.factor_llama2c import convert_llama2c, is_llama2c
from export.experts.factor_router import RouterSettings, Shares
from export.experts.tokens import windows_of
from refold.atomic import check_output, make_directory, write_atomically
from refold.errors import InputError, ModelError, StorageError, UsageError
from refold.experts import Resident, Tensor
from refold.experts.tensors import packed

__all__ = ["Factored", "Factoring", "discard", "factor", "factored_folder"]

TINY = 2.0**-60  # times a router's rows
PROFILED = 16  # windows from which neurons are grouped
DONE = "factored.json"
MATRIX = re.compile(r"\.mlp\.(gate|up|down)_proj\.weight$")
SHARD = "model-{:05d}-of-{:05d}.safetensors"
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Cut = tuple[F32, I64]  # a layer's router, and the order of its neurons
Stage = Callable[[str, int], None]
Step = Callable[[int], None]


@dataclass(frozen=True)
class Factoring:
    """Attributes:
    experts: N, a divisor of the intermediate size. active: k of them that a token uses; N is lossless.
    scaling: "sum" of the k experts, or "paper": FactorLLM's N / k times that.
    split: "clusters" of neurons that are active together, or "slices" as they lie.
    texts: what routers learn from; without any, text that the dense model writes itself. windows, length: how much of it.
    measured: text on which perplexities are told; without any, windows of the routers' text that they did not learn from.
    """

    experts: int
    active: int
    scaling: str = "sum"
    split: str = "clusters"
    texts: Sequence[Path] = ()
    windows: int = 64
    length: int = 256
    measured: Sequence[Path] = ()
    router: RouterSettings = field(default_factory=RouterSettings)

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise UsageError(f"--factor is 2 experts or more, not {self.experts}.")
        if not 1 <= self.active <= self.experts:
            raise UsageError(f"--active is 1 to {self.experts}, the number of experts, not {self.active}.")
        if self.scaling not in ("sum", "paper"):
            raise UsageError(f"--scaling is sum or paper, not {self.scaling!r}.")
        if self.split not in ("clusters", "slices"):
            raise UsageError(f"--split is clusters or slices, not {self.split!r}.")
        if self.windows < 4 or self.length < 8:
            raise UsageError("Routers learn from 4 windows of 8 tokens at least.")

    def scale(self, k: int) -> float:
        """Of the sum of k experts."""
        return self.experts / k if self.scaling == "paper" else 1.0


@dataclass(frozen=True)
class Factored:
    """What came of it.

    Attributes:
        dense: perplexity of the dense model. before, after: of the factored one with that many active, with untrained and
            with trained routers. text: what they were measured on.
        shares: by layer, of the trained routers.
    """

    experts: int
    active: int
    text: str
    tokens: int
    dense: float
    before: dict[int, float]
    after: dict[int, float]
    shares: list[Shares]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Factored:
        before, after = ({int(k): float(v) for k, v in told[name].items()} for name in ("before", "after"))
        shares = [Shares(tuple(s["used"]), s["agreed"]) for s in told["shares"]]
        return cls(told["experts"], told["active"], told["text"], told["tokens"], told["dense"], before, after, shares)

    def lines(self) -> Iterator[str]:
        yield f"Perplexity on {self.text} ({self.tokens:,} tokens): {self.dense:.3f} dense"
        for k in self.before:
            two = f"{self.before[k]:.3f} with untrained routers, {self.after[k]:.3f} with trained"
            yield f"  {k} of {self.experts} active: {two}"
        if self.shares:
            agreed = sum(s.agreed for s in self.shares) / len(self.shares)
            most = max(max(s.used) for s in self.shares) * self.experts / self.active
            yield f"  Routers agree with their teacher in {agreed:.0%}; the busiest expert has {most:.2f} times its share."


def factored_folder(output: Path) -> Path:
    """Where the factored checkpoint lies while `output` is being made."""
    return output.with_name(f".{output.name}.factored")


def factor(source: Path, folder: Path, how: Factoring, stage: Stage, step: Step) -> Factored:
    """Writes the factored checkpoint of `source`, a Llama folder or a llama2.c file, into `folder`, unless it is there already.

    Raises:
        InputError: not such a checkpoint, damaged, or no usable text. ModelError: another architecture, a width that N does
            not divide. StorageError: the disk.
    """
    try:
        return _factored(source, folder, how, stage, step)
    except BaseException:
        if not (folder / DONE).is_file():  # nothing in it is worth going on from
            discard(folder)
        raise


def _factored(source: Path, folder: Path, how: Factoring, stage: Stage, step: Step) -> Factored:
    if not folder.parent.is_dir():
        raise StorageError(f"{folder.parent} does not exist: make it, or write elsewhere.")
    dense = folder / "dense"
    try:
        make_directory(folder)
        if is_llama2c(source):
            make_directory(dense)
    except OSError as e:
        raise StorageError(f"{folder} cannot be made: {e.strerror or e}.") from e
    check_output(folder / DONE)
    if is_llama2c(source):
        key = _digest(source.read_bytes())
        convert_llama2c(source, dense)
    else:
        dense, key = source, ""
    checkpoint = Checkpoint.open(dense)
    _check(checkpoint, how)
    key = _digest(
        repr((key or checkpoint.fingerprint(), how, [_digest(_bytes(t)) for t in (*how.texts, *how.measured)])).encode()
    )
    if (known := _known(folder / DONE, key)) is not None:
        return known
    cuts, told = _learn(checkpoint, how, stage, step)
    stage("writing the factored checkpoint", checkpoint.config["num_hidden_layers"] + 1)
    _write(checkpoint, folder, how, cuts, step)
    write_atomically(folder / DONE, [json.dumps({"key": key, "told": told.to_json()}).encode()])
    return told


def discard(folder: Path) -> None:
    """Removes the factored checkpoint once its bundle is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}.", code="text") from e


def _known(path: Path, key: str) -> Factored | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Factored.from_json(found["told"]) if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(checkpoint: Checkpoint, how: Factoring) -> None:
    config, folder = checkpoint.config, checkpoint.folder
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelError(
            f"{folder} holds a {kind!r} model; --factor cuts Llama's feed-forwards.", code="unsupported-architecture"
        )
    if config.get("quantization_config"):
        raise ModelError(f"{folder} is quantised already: give the original in bfloat16, float16 or float32.", code="quantised")
    if config.get("mlp_bias"):
        raise ModelError(f"{folder} has biases in its feed-forwards, for which a factored model has no place.", code="bias")
    strange = sorted(n for n in checkpoint.places if ".mlp." in n and not MATRIX.search(n))
    if strange:
        raise InputError(
            f"config.json gives no place to {strange[0]} and {len(strange) - 1} more of {folder}: without them the model is "
            "another one.",
            code="unused",
        )
    try:
        inner = int(config["intermediate_size"])
        int(config["hidden_size"]), int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{folder / 'config.json'} lacks a size of the model.", code="checkpoint") from e
    if inner % how.experts:
        near = [n for n in range(2, 257) if inner % n == 0]
        raise ModelError(
            f"A feed-forward of {inner} cannot be cut into {how.experts} equal experts; --factor may be "
            f"{', '.join(map(str, near[:12])) or 'nothing'}.",
            code="factor",
        )


def _learn(checkpoint: Checkpoint, how: Factoring, stage: Stage, step: Step) -> tuple[list[Cut], Factored]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    stage("loading the dense model", 0)
    try:
        model = transformers.LlamaForCausalLM.from_pretrained(
            str(checkpoint.folder), local_files_only=True, dtype=torch.float32
        ).eval()
    except Exception as e:  # transformers raises many kinds
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"{checkpoint.folder} cannot be loaded: {first}", code="checkpoint") from e
    model.requires_grad_(False)
    ids, held, text = _texts(checkpoint, model, how, stage, step)
    seats = factor_router.seat(model, how.experts, how.router.seed)
    orders = [torch.arange(s.gate_proj.out_features) for s in seats]
    if how.split == "clusters" and how.active < how.experts:
        stage("finding neurons that are active together", len(ids[:PROFILED]))
        found = factor_cluster.profiles(model, seats, ids[:PROFILED], step)
        orders = [factor_cluster.balanced(p, how.experts, how.router.seed) for p in found]
        for s, order in zip(seats, orders, strict=True):
            factor_cluster.reorder(s, order)
    counts = sorted({1, max(1, how.experts // 2), how.active, how.experts})
    stage("measuring before the routers are trained", len(held) * (len(counts) + 1))
    dense = math.exp(factor_router.loss_of(model, seats, held, None, step))
    before = {k: math.exp(factor_router.loss_of(model, seats, held, k, step, how.scale(k))) for k in counts}
    stage("asking the dense model what its routers should do", len(ids))
    lessons = factor_router.collect(model, seats, ids, step)
    untrained = [s.router for s in seats]
    after, kept, shares = {how.experts: before[how.experts]}, untrained, list[Shares]()
    for k in [k for k in counts if k < how.experts]:
        stage(f"training routers for {k} of {how.experts}", len(seats) + len(held))
        trained = []
        for s, start, lesson in zip(seats, untrained, lessons, strict=True):
            trained.append(factor_router.train(start, lesson, k, how.scale(k), how.router))
            s.router = trained[-1][0]
            step(1)
        after[k] = math.exp(factor_router.loss_of(model, seats, held, k, step, how.scale(k)))
        if k == how.active:
            kept, shares = [router for router, _ in trained], [told for _, told in trained]
    told = Factored(how.experts, how.active, text, held.shape[0] * (held.shape[1] - 1), dense, before, after, shares)
    return [(r.numpy(), o.numpy()) for r, o in zip(kept, orders, strict=True)], told


def _texts(checkpoint: Checkpoint, model: Any, how: Factoring, stage: Stage, step: Step) -> tuple[I64, I64, str]:
    """What routers learn from, what is measured on, and its name."""
    length = min(how.length, int(checkpoint.config.get("max_position_embeddings", how.length)))
    if how.texts:
        ids = windows_of(checkpoint, how.texts, length, how.windows).ids
    else:
        stage("the dense model writes what its routers learn from", how.windows)
        ids = factor_router.generated(model, how.windows, length, how.router.seed, step)
    if how.measured:
        return (
            ids,
            windows_of(checkpoint, how.measured, length - 1, how.windows).ids,
            " and ".join(p.name for p in how.measured),
        )
    if len(ids) < 4:
        raise InputError("The routers' text holds fewer than 4 windows: give a longer one.", code="text")
    rest = max(1, len(ids) // 8)
    return ids[:-rest], ids[-rest:], "windows its routers did not learn from"


def _write(checkpoint: Checkpoint, folder: Path, how: Factoring, cuts: Sequence[Cut], step: Step) -> None:
    """A shard per layer and one for the rest: memory for one layer's feed-forward."""
    layers = len(cuts)
    shards = [[r for name in _rest(checkpoint) for r in [_as_is(checkpoint, name)]]]
    shards += [list(_layer(checkpoint, i, how, cuts[i])) for i in range(layers)]
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = SHARD.format(i + 1, len(shards))
        write_atomically(folder / name, packed(shard))
        where |= {r.name: name for r in shard}
        step(1)
    for name, content in (checkpoint.tokenizer_files() | checkpoint.generation_files()).items():
        write_atomically(folder / name, [content])
    write_atomically(folder / "model.safetensors.index.json", [json.dumps({"metadata": {}, "weight_map": where}).encode()])
    write_atomically(folder / "config.json", [json.dumps(_config(checkpoint, how), indent=1).encode()])


def _rest(checkpoint: Checkpoint) -> list[str]:
    return [n for n in checkpoint.places if ".mlp." not in n and not n.endswith("rotary_emb.inv_freq")]


def _as_is(checkpoint: Checkpoint, name: str) -> Resident:
    return Resident(name, checkpoint.dtype(name), checkpoint.shape(name), lambda: checkpoint.read(name).data)


def _layer(checkpoint: Checkpoint, layer: int, how: Factoring, cut: Cut) -> Iterator[Resident]:
    experts, times = how.experts, np.float32(how.active * how.scale(how.active))
    inner, hidden = int(checkpoint.config["intermediate_size"]) // experts, int(checkpoint.config["hidden_size"])
    router, order = cut
    dense, moe = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."

    def read(name: str, shape: tuple[int, int]) -> F32:
        found = checkpoint.places.get(f"{dense}{name}_proj.weight")
        if found is None or found[1].shape != shape:
            raise InputError(f"{checkpoint.folder} lacks {dense}{name}_proj.weight of shape {shape}.", code="checkpoint")
        return np.asarray(checkpoint.read(f"{dense}{name}_proj.weight").numpy(), np.float32)

    def first() -> bytes:
        halves = [read(n, (experts * inner, hidden))[order].reshape(experts, inner, hidden) for n in ("gate", "up")]
        return np.concatenate(halves, 1).tobytes()

    def second() -> bytes:
        down = read("down", (hidden, experts * inner))[:, order].reshape(hidden, experts, inner).swapaxes(0, 1)
        return np.ascontiguousarray(down * times).tobytes()

    yield Resident(moe + "input_linear.weight", "F32", (experts, 2 * inner, hidden), first)
    yield Resident(moe + "output_linear.weight", "F32", (experts, hidden, inner), second)
    yield Resident.of(moe + "router.layer.weight", Tensor.of(router * np.float32(TINY)))


def _config(checkpoint: Checkpoint, how: Factoring) -> dict[str, Any]:
    """A Granite-MoE configuration that computes what the Llama did. transformers' own names, of any of its versions."""
    told = dict(checkpoint.config)
    heads, hidden = int(told["num_attention_heads"]), int(told["hidden_size"])
    head = int(told.get("head_dim") or hidden // heads)
    for name in ("auto_map", "pretraining_tp", "mlp_bias", "head_dim", "_name_or_path"):
        told.pop(name, None)
    if head * heads != hidden:
        told["head_dim"] = head
    return told | {
        "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "attention_multiplier": head**-0.5,
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        "intermediate_size": int(told["intermediate_size"]) // how.experts, "num_local_experts": how.experts,
        "num_experts_per_tok": how.active, "hidden_act": told.get("hidden_act", "silu"),
        "rms_norm_eps": told.get("rms_norm_eps", 1e-6), "output_router_logits": False,
    }  # fmt: skip
