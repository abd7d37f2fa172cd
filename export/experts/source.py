"""A checkpoint seen as transformers' model: every resident tensor under its name there, and the experts by layer and number.

The model itself is only built without memory ("meta"), to know its names and shapes; weights are read when asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.experts.agreement import agree, by
from export.experts.checkpoint import FLOATS, Checkpoint
from export.experts.families import Family, Layout, family_of
from refold.errors import InputError, ModelError, UsageError
from refold.experts import Geometry, Matrix, Resident, Tensor, interface, quantise
from refold.norms import NormKind, NormSite, NormState, NormTable, SiteTensors

__all__ = ["Source", "config_of", "model_class"]

BLOCK_ELEMENTS = 1 << 17  # of a matrix quantised at a time: what numpy needs beside it stays under 8 MB, and in the cache
NORM = re.compile(r"(^|\.)[a-z_]*norm[a-z_]*\.weight$")
F32 = NDArray[np.float32]
Key = tuple[int, int]


@dataclass(frozen=True)
class _Names:
    """Of one expert, on disk: the tensors of its two matrices, and its number where they hold all experts."""

    matrices: tuple[tuple[str, ...], tuple[str, ...]]
    fused: bool


@dataclass(frozen=True)
class Source:
    """Attributes:
    modules: layer number to the experts' module in the model.
    resident: the model's other tensors, in its order.
    notes: where the checkpoint and its config.json do not say the same, and what was done. epsilon: of its norms.
    """

    checkpoint: Checkpoint
    family: Family
    geometry: Geometry
    modules: Mapping[int, str]
    resident: Sequence[Resident]
    notes: Sequence[str]
    epsilon: float
    _names: Mapping[int, tuple[Layout, str]]

    @classmethod
    def open(cls, folder: Path, group: int | None = None, unused: bool = False) -> Source:
        """Checks every name, shape and type against config.json.

        Args:
            group: neighbours that share a scale. unused: leave out tensors that the model has no place for.

        Raises:
            InputError: tensors missing, misshapen, of a wrong type, or that the model has no place for. ModelError: not
                supported.
        """
        checkpoint = Checkpoint.open(folder)
        family = family_of(checkpoint.config)
        model, modules = _skeleton(checkpoint, family)
        if not modules:
            raise ModelError(f"{folder} describes a {family.model_type} model without experts.", code="no-experts")
        state = model.state_dict(keep_vars=True)
        shapes = {name: tuple(t.shape) for name, t in state.items()}
        geometry = _geometry(model.config, family, shapes, modules, group)
        _check_experts(model, modules, geometry)
        layouts = {layer: _layout(checkpoint, family, modules[layer], layer) for layer in geometry.layers}
        used: set[str] = set()
        for layer in geometry.layers:
            for names in (_names_of(layouts[layer], e) for e in range(geometry.experts)):
                for wanted, stacked in zip(geometry.shapes, names.matrices, strict=True):
                    _check_matrix(checkpoint, stacked, wanted, geometry.experts if names.fused else 0)
                    used.update(stacked)
        inside = tuple(m + "." for m in modules.values())
        on_disk = {family.resident_name(n): n for n in checkpoint.places if n not in used}
        others = {n: t for n, t in state.items() if not n.startswith(inside)}
        agreement = agree(checkpoint, model, others, on_disk, unused)
        resident = [_resident(checkpoint, name, on_disk[name]) for name in agreement.stored]
        epsilon = float(getattr(model.config, family.epsilon))
        return cls(checkpoint, family, geometry, modules, resident, agreement.notes, epsilon, layouts)

    @property
    def order(self) -> list[Key]:
        """(layer, expert) of every expert, in the order of the records."""
        return self.geometry.keys

    def _pieces(self, layer: int, expert: int) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """For each of the two matrices, the tensors that are stacked to it."""
        names = _names_of(self._names[layer], expert)
        for stacked in names.matrices:
            yield ((n, self.checkpoint.read(n, expert if names.fused else None)) for n in stacked)

    def weights(self, layer: int, expert: int) -> list[F32]:
        """The expert's matrices, float32. Raises InputError: not finite, or unreadable."""
        return [
            np.concatenate([_finite(name, t.numpy().astype(np.float32)) for name, t in pieces])
            for pieces in self._pieces(layer, expert)
        ]

    def quantised(self, layer: int, expert: int, bits: int, threads: int = 1) -> list[Matrix]:
        """The expert at `bits`; beside it, memory for its tensors as stored and a block of rows. Raises as `weights`."""
        out = []
        group = self.geometry.group
        for pieces in self._pieces(layer, expert):
            parts: list[Matrix] = []
            for name, tensor in pieces:
                rows, columns = tensor.shape
                step = max(1, BLOCK_ELEMENTS // columns)

                def block(start: int, name: str = name, tensor: Tensor = tensor, step: int = step) -> Matrix:
                    return quantise(_finite(name, _rows(tensor, start, start + step)), bits, group)

                starts = range(0, rows, step)
                if threads == 1 or len(starts) == 1:
                    parts += map(block, starts)
                else:
                    with ThreadPoolExecutor(threads) as pool:
                        parts += pool.map(block, starts)
            scales, codes = np.concatenate([p.scales for p in parts]), np.concatenate([p.codes for p in parts])
            out.append(Matrix((len(scales), parts[0].shape[1]), bits, group, scales, codes))
        return out

    def norms(self) -> NormTable:
        """The gains of the resident norms as sites: what a release may change."""
        by_name = {t.name: t for t in self.resident}
        sites = []
        for t in self.resident:
            if not NORM.search(t.name) or len(t.shape) != 1 or t.dtype not in FLOATS:
                continue
            gain = Tensor(t.dtype, t.shape, t.read()).numpy().astype(np.float32)
            offset = by_name.get(t.name.removesuffix("weight") + "bias")
            add = Tensor(offset.dtype, offset.shape, offset.read()).numpy() if offset else np.zeros(0, np.float32)
            sites.append(
                NormSite(
                    t.name,
                    NormKind.LAYER if offset else NormKind.RMS,
                    NormState(gain, add.astype(np.float32)),
                    epsilon=self.epsilon,
                    tensors=SiteTensors(multiply=t.name, add=offset.name if offset else ""),
                )
            )
        return NormTable(tuple(sites))


def config_of(checkpoint: Checkpoint) -> Any:
    """transformers' configuration object. Raises ModelError: transformers refuses it, or is not installed."""
    try:
        import transformers

        return transformers.AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True, trust_remote_code=False)
    except ModuleNotFoundError as e:
        raise ModelError(
            "`refold export experts` needs transformers: pip install 'refold[export,moe]'.", code="no-transformers"
        ) from e
    except Exception as e:  # transformers raises many kinds; none of them is ours
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"transformers refuses {checkpoint.folder / 'config.json'}: {first}", code="checkpoint") from e


def model_class(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.architecture)


def _skeleton(checkpoint: Checkpoint, family: Family) -> tuple[Any, dict[int, str]]:
    """transformers' model without memory, and the experts' module by layer."""
    config = config_of(checkpoint)
    try:
        with torch.device("meta"):
            model = model_class(family)(config)
    except Exception as e:
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"{checkpoint.folder / 'config.json'} describes no possible model: {first}", code="checkpoint") from e
    modules: dict[int, str] = {}
    names = [name for name, _ in model.named_modules()]
    for stack in family.stacks:
        pattern = re.compile(re.escape(stack.module).replace(r"\{block\}", r"(\d+)") + "$")
        blocks = 1 + max((int(m[1]) for n in names if (m := re.match(_blocks(stack.module), n))), default=-1)
        for name in names:
            if match := pattern.match(name):
                modules[int(match[1]) - (blocks if stack.encoder else 0)] = name
    return model, dict(sorted(modules.items()))


def _check_experts(model: Any, modules: Mapping[int, str], geometry: Geometry) -> None:
    """Raises ModelError: the experts compute something else than records can hold."""
    from transformers.activations import ACT2FN
    from transformers.integrations import moe

    activation, probe = ACT2FN[geometry.activation], torch.linspace(-8, 8, 65)
    for name in modules.values():
        module = model.get_submodule(name)
        if geometry.gated:
            interface.check_fused(module, geometry, moe, activation, probe)
        else:
            interface.check_dense(dict(module.items()), geometry, activation, probe)


def _blocks(module: str) -> str:
    """Pattern of the blocks themselves, sparse or not: encoder.block.3 of encoder.block.{block}.layer.1.mlp.experts."""
    return re.escape(module.partition("{block}")[0]) + r"(\d+)$"


def _geometry(
    config: Any,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    modules: Mapping[int, str],
    group: int | None,
) -> Geometry:
    first = next(iter(modules.values()))
    if family.gated:
        experts, double, hidden = shapes[f"{first}.gate_up_proj"]
        intermediate = double // 2
    else:
        intermediate, hidden = shapes[f"{first}.expert_0.wi.weight"]
        experts = sum(n.startswith(f"{first}.") and n.endswith(".wi.weight") for n in shapes)
    top_k = family.top_k if isinstance(family.top_k, int) else getattr(config, family.top_k, None)
    if not isinstance(top_k, int) or not 1 <= top_k <= experts:
        raise InputError(f"config.json says that a token uses {top_k} of {experts} experts: that cannot be.", code="checkpoint")
    if group is None:
        group = 64 if hidden % 64 == 0 and intermediate % 64 == 0 else 32
    if group < 32 or group % 32:
        raise UsageError(f"--group is a multiple of 32, not {group}.")
    activation = str(getattr(config, family.activation))
    return Geometry(
        family.model_type, tuple(modules), experts, top_k, hidden, intermediate, family.gated, activation, group
    )  # fmt: skip


def _layout(checkpoint: Checkpoint, family: Family, module: str, layer: int) -> tuple[Layout, str]:
    """The way this block's experts are stored, and their prefix on disk."""
    block = next(p for p in module.split(".") if p.isdigit())
    tried = [(layout, layout.module.format(module=module, block=block)) for layout in family.layouts]
    for layout, prefix in tried:
        if any(n.format(module=prefix, expert=0) in checkpoint.places for n in layout.inner + layout.outer):
            return layout, prefix
    wanted = tried[0][0].inner[0].format(module=tried[0][1], expert=0)
    raise InputError(f"{checkpoint.folder} lacks {wanted}: the checkpoint is incomplete.", code="checkpoint")


def _names_of(layout: tuple[Layout, str], expert: int) -> _Names:
    how, prefix = layout
    inner, outer = (tuple(n.format(module=prefix, expert=expert) for n in names) for names in (how.inner, how.outer))
    return _Names((inner, outer), how.fused)


def _check_matrix(checkpoint: Checkpoint, names: Sequence[str], wanted: tuple[int, int], experts: int) -> None:
    rows, columns = wanted
    shape = (rows // len(names), columns)
    if experts:
        shape = (experts, *shape)  # type: ignore[assignment]
    for name in names:
        if name not in checkpoint.places:
            raise InputError(f"{checkpoint.folder} lacks {name}: the checkpoint is incomplete.", code="checkpoint")
        if checkpoint.shape(name) != shape:
            raise InputError(
                f"{name} has shape {by(checkpoint.shape(name))} where config.json asks for {by(shape)}.", code="checkpoint"
            )
        if checkpoint.dtype(name) not in FLOATS:
            raise InputError(f"{name} is {checkpoint.dtype(name)}: experts are floating point.", code="checkpoint")


def _resident(checkpoint: Checkpoint, name: str, disk: str) -> Resident:
    return Resident(name, checkpoint.dtype(disk), checkpoint.shape(disk), _reader(checkpoint, disk))


def _reader(checkpoint: Checkpoint, name: str) -> Callable[[], bytes]:
    def read() -> bytes:
        tensor = checkpoint.read(name)
        if tensor.dtype in FLOATS and tensor.shape:
            rows = tensor.shape[0]
            step = max(1, BLOCK_ELEMENTS * rows // max(len(tensor.data) // 2, 1))
            for start in range(0, rows, step):
                _finite(name, _rows(tensor, start, start + step))
        return tensor.data

    return read


def _rows(tensor: Tensor, start: int, stop: int) -> F32:
    """Some rows as float32, without the others."""
    rows = tensor.shape[0]
    stop, size = min(stop, rows), len(tensor.data) // max(rows, 1)
    part = Tensor(tensor.dtype, (stop - start, *tensor.shape[1:]), tensor.data[start * size : stop * size])
    return part.numpy().astype(np.float32)


def _finite(name: str, values: F32) -> F32:
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds infinite numbers or NaN: the checkpoint is damaged or diverged.", code="not-finite")
    return values
