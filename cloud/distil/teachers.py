"""Teachers: any networks, several averaged, each adapted to the population it is to judge.

A robust network is not robust enough: as is, ResNet-56 sees through heavy noise hardly better than the student. So every
teacher measures the domain's statistics on unbiased samples, mixes them with its own (`norm_mode.population_moments`), and
votes on each picture and its mirror image. Selected samples are never measured: they are a biased population.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloud.distil.norm_mode import Moments, NormCall, NormMode, population_moments, serve_moments
from cloud.distil.settings import DistilSettings
from refold.errors import InputError, ModelError, UsageError
from refold.preprocess import Preprocess

__all__ = ["Teacher", "TeacherSource", "Teachers", "load_teachers"]

U8 = NDArray[np.uint8]
COUNTER = "num_batches_tracked"  # of training batches, which no prediction reads


class TeacherSource(Protocol):
    """What names a teacher: `cloud.settings.TeacherSpec`, or anything with these two."""

    @property
    def spec(self) -> str: ...

    @property
    def weights(self) -> str: ...


@dataclass
class Teacher:
    """One network in evaluation mode, input float32 (N, 3, H, W) preprocessed as the bundle says, output (N, C) logits."""

    name: str
    network: Callable[[Tensor], Tensor]
    moments: dict[str, list[Moments]] = field(default_factory=dict)

    def affine(self, example: Tensor) -> list[Tensor]:
        """gamma and beta of every batch norm, in execution order."""
        found: list[Tensor] = []

        def rule(call: NormCall) -> Tensor:
            found.extend(t for t in (call.gamma, call.beta) if isinstance(t, nn.Parameter))
            return call.normalise(call.source)

        with torch.no_grad(), NormMode(rule):
            self.network(example)
        return found


class Teachers:
    """Several teachers with one vote each per view.

    Args:
        teachers: at least one.
        preprocess: the bundle's.
        settings: mixing share, views, batch.
    """

    def __init__(self, teachers: Sequence[Teacher], preprocess: Preprocess, settings: DistilSettings | None = None) -> None:
        if not teachers:
            raise UsageError("Distillation needs at least one teacher: name one in the bundle's `teachers`.")
        self.teachers = tuple(teachers)
        self.preprocess = preprocess
        self.settings = settings or DistilSettings()

    def adapt(self, domain: str, images: U8) -> None:
        """Measures a domain's statistics on an unbiased sample of it, uint8 (N, H, W, 3); few samples count for little."""
        n = min(len(images), self.settings.population)
        if not n:
            return
        x = torch.from_numpy(self.preprocess.apply(images[-n:]))
        weight = self.settings.teacher_mix * n / (n + self.settings.prior_samples)
        for teacher in self.teachers:
            teacher.moments[domain] = population_moments(teacher.network, x, weight)

    def probabilities(self, images: U8, domain: str = "") -> NDArray[np.float32]:
        """Mean of all votes, float32 (N, C). A domain that was never adapted to is judged with the teachers' own statistics."""
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), self.settings.batch):
                x = torch.from_numpy(self.preprocess.apply(images[start : start + self.settings.batch]))
                views = list(self._views(x))
                votes = [
                    torch.softmax(serve_moments(t.network, view, t.moments.get(domain, ())), 1)
                    for t in self.teachers
                    for view in views
                ]
                parts.append(torch.stack(votes).mean(0))
        if not parts:
            raise InputError("There are no pictures to judge.")
        return torch.cat(parts).numpy().astype(np.float32)

    def votes(self, images: U8, domain: str = "") -> NDArray[np.float32]:
        """Each teacher's mean over its views, float32 (teachers, N, C); otherwise as `probabilities`."""
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), self.settings.batch):
                views = list(self._views(torch.from_numpy(self.preprocess.apply(images[start : start + self.settings.batch]))))
                each = [
                    [torch.softmax(serve_moments(t.network, view, t.moments.get(domain, ())), 1) for view in views]
                    for t in self.teachers
                ]
                parts.append(torch.stack([torch.stack(votes).mean(0) for votes in each]))
        if not parts:
            raise InputError("There are no pictures to judge.")
        return torch.cat(parts, 1).numpy().astype(np.float32)

    def forget(self, domain: str) -> None:
        """Drops what was measured of a domain."""
        for teacher in self.teachers:
            teacher.moments.pop(domain, None)

    def _views(self, x: Tensor) -> Iterable[Tensor]:
        yield x
        if self.settings.flips:
            yield x.flip(3)
        if s := self.settings.shifts:
            padded = nn.functional.pad(x, (s, s, s, s), mode="reflect")
            h, w = x.shape[2:]
            for top, left in ((0, s), (2 * s, s), (s, 0), (s, 2 * s)):
                yield padded[:, :, top : top + h, left : left + w]


def load_teachers(specs: Iterable[TeacherSource], preprocess: Preprocess, settings: DistilSettings | None = None) -> Teachers:
    """Loads teachers.

    Args:
        specs: `.spec` is a `.pt2`, `file.py:callable` or `package.module:callable` (called without arguments, returns an
            nn.Module); `.weights` is empty or a `.npz`, `.safetensors` or weights-only checkpoint with the module's own names.

    Raises:
        UsageError: a spec or file cannot be found or has another form; no teacher at all.
        InputError: the weights do not fit or are not finite.
        ModelError: the callable fails or returns no network.
    """
    teachers = []
    for source in specs:
        network = _program(source.spec) if source.spec.endswith(".pt2") else _built(source.spec)
        if source.weights:
            _fill(network, Path(source.weights))
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputError(f"The teacher {source.spec} has a value in {name} that is not finite: train or load it again.")
        teachers.append(Teacher(source.spec, network))
    return Teachers(teachers, preprocess, settings)


def _program(path: str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()
    except FileNotFoundError:
        raise UsageError(f"There is no teacher at {path}.") from None
    except Exception as e:  # a damaged archive makes torch raise almost anything
        raise ModelError(f"The teacher {path} cannot be loaded by this torch: export it again.", detail=str(e)) from e


def _built(spec: str) -> nn.Module:
    where, _, name = spec.rpartition(":")
    if not where:
        raise UsageError(f"{spec!r} names no teacher: give a .pt2, file.py:callable or package.module:callable.")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as e:
        raise UsageError(f"The teacher {spec} cannot be found: {e}.") from e
    except (Exception, SystemExit) as e:  # a user's file: whatever it raises when it is read becomes a sentence
        raise ModelError(f"The teacher's file {where} cannot be imported: {type(e).__name__}: {e}.") from e
    factory = getattr(module, name, None)
    if factory is None:
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else "give file.py:callable or package.module:callable."
        raise UsageError(f"The teacher {spec} cannot be found: {where} has no {name!r}; {hint}")
    try:
        network = factory()
    except Exception as e:  # a user's code: whatever it raises becomes a sentence
        raise ModelError(f"The teacher {spec} cannot be made: {e}.") from e
    if not isinstance(network, nn.Module):
        raise ModelError(f"The teacher {spec} is a {type(network).__name__}, not a torch network.")
    return network.eval()


def _import_file(path: Path) -> object:
    name = f"refold_teacher_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _fill(network: nn.Module, path: Path) -> None:
    """Fills parameters and buffers by name, all of them and no others; counters of training batches may be missing."""
    arrays = _arrays(path)
    state = network.state_dict()
    unknown = sorted(name for name in arrays if name not in state and not name.endswith(COUNTER))
    missing = sorted(name for name in state if name not in arrays and not name.endswith(COUNTER))
    if unknown or missing:
        parts = [f"{_some(names)} {what}" for names, what in ((missing, "not given"), (unknown, "not known")) if names]
        raise InputError(f"The weights {path} do not fit the teacher: {', '.join(parts)}.")
    for name, tensor in state.items():
        if name.endswith(COUNTER):
            continue
        found = arrays[name]
        if found.shape != tensor.shape:
            raise InputError(
                f"The weights {path} do not fit the teacher at {name}: {tuple(found.shape)} there, {tuple(tensor.shape)} here."
            )
        state[name] = found.to(tensor.dtype)
    network.load_state_dict(state)


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as z:
                return {k: torch.from_numpy(np.array(z[k])) for k in z.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"There are no weights at {path}.") from None
    except Exception as e:  # pickles that hold more than tensors, truncated archives, ...
        raise InputError(
            f"The weights {path} cannot be read without running code of theirs: save tensors only.", detail=str(e)
        ) from e
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"The weights {path} are not a mapping of names to tensors.")
    return {str(k).removeprefix("module."): v for k, v in content.items()}
