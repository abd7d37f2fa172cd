"""The person's module as the truth of an export: asked before the capture, compared with the float graph afterwards."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F  # noqa: N812

from export.capture import capture
from export.frontend.reference import Reference, answer, separate
from export.frontend.verify import alike, differs, first_apart, graph_values, module_records
from export.ir import Graph
from refold.errors import GateError

__all__ = ["captured", "hold_to_module"]

F32 = NDArray[np.float32]


def captured(model: nn.Module | ExportedProgram, x: F32) -> tuple[Graph, Reference]:
    """The model's graph, and what the model itself answers to x, float32 (N, 3, H, W); asked first.

    Raises:
        ModelError, InputError, GateError: as `export.capture.capture`, or the answer is not a function of one image.
    """
    reference = Reference.of(model, x)
    try:
        graph = capture(model, *x.shape[2:])
    except GateError:
        if reference.doubt is not None:  # it differs because it never answers alike
            raise reference.doubt from None
        raise
    if reference.doubt is not None:
        raise reference.doubt
    return graph, reference


def hold_to_module(reference: Reference, graph: Graph, truth: Graph, logits: F32, x: F32) -> None:
    """Compares the float graph that the integers stand for with the module, on every calibration image.

    Args:
        graph: as captured; truth: after its rules, which leave out a softmax at the end.
        logits: float32 (N, classes), of `truth` for x.

    Raises:
        GateError: they differ; the first layer that does is named.
    """
    if reference.answers is None:
        return
    wanted, ours = torch.from_numpy(reference.answers), _answers(graph, torch.from_numpy(logits))
    if wanted.shape != ours.shape:
        raise differs("the float graph", "")
    worst = int((wanted - ours).abs().amax(1).nan_to_num(torch.inf).argmax())
    one = torch.from_numpy(x[worst : worst + 1])

    def ask(images: Tensor) -> Tensor:
        model = reference.model
        found = answer(model if isinstance(model, ExportedProgram) else separate(model), images)
        assert found is not None
        return found

    if not alike(wanted[worst : worst + 1], ours[worst : worst + 1], ask, one, wanted):
        raise differs("the float graph", _where(reference, truth, one))


def _answers(graph: Graph, logits: Tensor) -> Tensor:
    """Logits as the model itself returns them."""
    last = graph.producers().get(graph.output)
    if last is None or last.op not in ("softmax", "log_softmax") or last.attributes["axis"] != 1:
        return logits
    return F.softmax(logits, 1) if last.op == "softmax" else F.log_softmax(logits, 1)


def _where(reference: Reference, truth: Graph, x: Tensor) -> str:
    if isinstance(reference.model, ExportedProgram):
        return ""
    return first_apart(module_records(separate(reference.model), x)[1], graph_values(truth, x)[1])
