"""What a person's own module answers, run eagerly, before anything is captured: the truth every later form is held to.

The module itself is left as it was: copies of it are run. A module whose answer is not a function of one image (it changes from
call to call, remembers, or depends on how many images come together) has no truth: the reference carries the doubt, and export
refuses it where it finds nothing more exact to say.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from export.frontend.faults import line_of
from export.frontend.run import run_program
from export.frontend.verify import Ask, alike
from refold.errors import ModelError

__all__ = ["Reference", "answer", "check_training", "probe", "separate"]

F32 = NDArray[np.float32]
BATCH = 32


def probe(height: int, width: int, count: int = 3) -> Tensor:
    """Inputs where no images are at hand: float32 (count, 3, height, width), the same every time."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def check_training(model: nn.Module) -> None:
    """Raises ModelError naming the first part of a model that is in training mode."""
    left = [name or "the model itself" for name, m in model.named_modules() if m.training]
    if left:
        raise ModelError(
            f"{left[0]} is in training mode: call .eval() last in the function that makes the model.", code="training"
        )


def separate(model: nn.Module) -> nn.Module:
    """A float32 copy to run or capture, which may change. Raises ModelError where the module cannot be copied."""
    try:
        return copy.deepcopy(model).float()
    except Exception as e:
        raise ModelError(
            f"The model cannot be copied ({type(e).__name__}: {line_of(e)}), and export runs copies so as not to change it: "
            "keep locks, files and tensors with a history out of its attributes.",
            code="copy",
        ) from e


def answer(model: nn.Module | ExportedProgram, x: Tensor) -> Tensor | None:
    """The one tensor a model returns for a batch; None where it returns something else, which is told elsewhere.

    Args:
        model: a module (it may change), or a program (it does not).
        x: float32 (N, 3, H, W).

    Raises:
        ModelError: the model fails.
    """
    try:
        with torch.no_grad():
            found: Any = run_program(model, x) if isinstance(model, ExportedProgram) else model(x.clone())
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"The model does not take an input of {tuple(x.shape)}: {line_of(e) or type(e).__name__}.") from e
    tensors = [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]
    return tensors[0].detach().clone() if len(tensors) == 1 else None


@dataclass(frozen=True)
class Reference:
    """Attributes:
    answers: float32, one row an image; None where the model returns something else than one tensor with a row an image.
    doubt: why these are not the answers of a function of one image, where they are not.
    """

    model: nn.Module | ExportedProgram
    answers: F32 | None
    doubt: ModelError | None = None

    @classmethod
    def of(cls, model: nn.Module | ExportedProgram, x: F32) -> Reference:
        """Runs a model on all of x, float32 (N, 3, H, W), and twice and image by image on the first.

        Raises:
            ModelError: it is in training mode, it fails, or it cannot be copied.
        """

        def anew() -> nn.Module | ExportedProgram:
            return model if isinstance(model, ExportedProgram) else separate(model)

        if isinstance(model, nn.Module):
            check_training(model)
        one, inputs = anew(), torch.from_numpy(np.ascontiguousarray(x))
        parts = [answer(one, part) for part in torch.split(inputs, BATCH)]
        if any(
            p is None or p.dim() < 1 or len(p) != len(part) for p, part in zip(parts, torch.split(inputs, BATCH), strict=True)
        ):
            return cls(model, None)
        found = torch.cat([p for p in parts if p is not None])
        first = inputs[:BATCH]

        def ask(images: Tensor) -> Tensor:
            got = answer(anew(), images)
            assert got is not None
            return got

        doubt = _asked_again(one, first, found[: len(first)], ask)
        return cls(model, found.to(torch.float32).numpy(), doubt)


def _asked_again(model: nn.Module | ExportedProgram, x: Tensor, before: Tensor, ask: Ask) -> ModelError | None:
    again = answer(model, x)
    if again is None or not alike(before, again, lambda images: before, x):
        return ModelError(
            "The model answers the same images differently from one call to the next: it draws random numbers, counts, or "
            "remembers. Call .eval(), and take what changes out of forward.",
            code="not-a-function",
        )
    few = x[:2]
    alone = [answer(model, image[None]) for image in few]
    row = (1, *before.shape[1:])
    if any(a is None or a.shape != row for a in alone) or not alike(
        before[: len(few)], torch.cat([a for a in alone if a is not None]), ask, few, before
    ):
        return ModelError(
            "The model answers an image differently alone than among others: a device hands it one at a time. Take what "
            "depends on the batch out of forward.",
            code="batch",
        )
    return None
