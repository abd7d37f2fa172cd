"""From what the user names (MODEL, weights) to a captured graph, norms kept as they are."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from export.frontend.faults import line_of
from export.frontend.functional import functionalise
from export.frontend.reference import check_training, probe, separate
from export.frontend.verify import check_lowered, check_module
from export.ir import Graph
from export.lower import known_operators, lower
from export.weights import load_weights
from refold.errors import InputError, ModelError, RefoldError, UsageError

__all__ = ["capture", "load_model", "load_program", "program_of"]


def load_model(spec: str, weights: Path | None = None) -> nn.Module | ExportedProgram:
    """MODEL of the command line.

    Args:
        spec: `file.py:callable`, `package.module:callable` (a module class or a function without required arguments that
            returns a module), or the path of a `.pt2` exported program.
        weights: see `export.weights`; needed unless the callable or the `.pt2` brings its own.

    Raises:
        UsageError: there is no such file, module or callable.
        ModelError: it fails, or does not give a torch module.
        InputError: the weights do not fit.
    """
    if spec.endswith(".pt2"):
        if weights is not None:
            raise UsageError("A .pt2 program carries its own weights: leave --weights out.")
        return load_program(Path(spec))
    target, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise UsageError(f"MODEL {spec!r} is neither file.py:callable, package.module:callable nor a .pt2 file.")
    factory = getattr(_import(target), name, None)
    if not callable(factory):
        raise UsageError(f"{target} has no callable {name!r}.", code="no-model")
    try:
        module = factory()
    except RefoldError:
        raise
    except Exception as e:
        raise ModelError(f"{spec} failed when it was called without arguments: {type(e).__name__}: {e}") from e
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec} returned {type(module).__name__}; it must return a torch.nn.Module.")
    if weights is not None:
        load_weights(module, weights)
    return module.eval()


def _import(target: str) -> object:
    if not target.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(target)
        except ImportError as e:
            raise UsageError(f"The module {target} cannot be imported: {e}.", code="no-model") from e
        finally:
            sys.path.remove(str(Path.cwd()))
    path = Path(target).resolve()
    if not path.is_file():
        raise UsageError(f"There is no file {target}.", code="no-model")
    roots = [str(path.parent), str(Path.cwd())]
    spec = importlib.util.spec_from_file_location(f"refold_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path[:0] = roots
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise ModelError(f"{target} cannot be run: {type(e).__name__}: {e}") from e
    finally:
        for root in roots:
            sys.path.remove(root)
    return module


def load_program(path: Path) -> ExportedProgram:
    """Raises UsageError when there is no such file, ModelError when this torch cannot read it."""
    if not path.is_file():
        raise UsageError(f"There is no file {path}.", code="no-model")
    try:
        return torch.export.load(path)
    except Exception as e:  # zip, json and schema errors of many kinds
        raise ModelError(f"{path} is not an exported program this torch ({torch.__version__}) reads.", detail=str(e)) from e


def capture(model: nn.Module | ExportedProgram, height: int, width: int) -> Graph:
    """The graph of a model at one input size, any batch size; it computes what the model does, which is checked.

    Raises:
        InputError: a weight is NaN or infinite.
        ModelError: torch cannot capture it, it is in training mode, or it uses an operator export does not know.
        GateError: the graph does not compute what the model does; the first layer that differs is named.
    """
    program, example = program_of(model, height, width), probe(height, width)
    for name, tensor in program.state_dict.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} contains NaN or infinity: these weights cannot be exported.", code="not-finite")
    pure = functionalise(program, example)
    try:
        graph = lower(_decomposed(pure))
    except ModelError as e:
        if e.code == "operator":
            lower(pure)  # refuses too, but names the operator as the person wrote it
        raise
    for name, value in graph.constants.items():
        if not np.isfinite(value).all():
            raise InputError(f"{name} contains NaN or infinity: these weights cannot be exported.", code="not-finite")
    check_lowered(program, graph, example)
    return graph


def program_of(model: nn.Module | ExportedProgram, height: int, width: int) -> ExportedProgram:
    """The model as torch captured it: weights and names inside, the Python class no longer needed. Raises as `capture`.

    The module is left as it was: a copy of it is captured.
    """
    if isinstance(model, ExportedProgram):
        shape = tuple(model.graph_signature.user_inputs and _input_shape(model))
        if shape[1:] != (3, height, width):
            raise ModelError(
                f"The program takes {shape}; the preprocessing makes (batch, 3, {height}, {width}).", code="inputs"
            )
        return model
    check_training(model)
    program = _export(separate(model), (3, height, width))
    check_module(lambda: separate(model), program, probe(height, width))
    return program


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """Operators that export has no word for, and only those, in terms of simpler ones where torch knows how."""
    for _ in range(3):
        unknown = {n.target for n in program.graph.nodes if n.op == "call_function"} - known_operators()
        known = torch.export.default_decompositions()
        table = {target: known[target] for target in unknown if target in known}
        if not table:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions(table)
    return program


def _input_shape(program: ExportedProgram) -> tuple[int, ...]:
    wanted = program.graph_signature.user_inputs[0]
    node = next(n for n in program.graph.nodes if n.name == wanted)
    return tuple(int(s) if isinstance(s, int) else -1 for s in node.meta["val"].shape)


def _export(model: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    example = torch.zeros(2, *shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        kept = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        try:
            model(example)  # once, so that what a model makes at its first call is there
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name in kept and kept[name].shape == tensor.shape:
                    tensor.copy_(kept[name])
        except Exception as e:
            raise ModelError(f"The model does not take an input of (2, {', '.join(map(str, shape))}): {line_of(e)}.") from e
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # torch logs and prints the whole graph of what it cannot capture
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch")},))
        except Exception as e:  # torch._dynamo and the symbolic shapes have their own trees
            raise ModelError(
                f"torch.export cannot capture the model: {line_of(e)}. Control flow that depends on the image, or a batch size "
                "written into the code, are the usual reasons.",
                code="capture",
                detail=str(e),
            ) from e
        finally:
            logging.disable(disabled)
