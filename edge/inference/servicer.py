"""Between the Open Inference Protocol's messages and the handlers: bytes to arrays, errors to status codes."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from edge.inference.fields import check, known
from edge.inference.handlers import Handlers, InferenceRequest, Tensor, UnknownModelError
from refold import __version__
from refold.errors import InputError, RefoldError, UsageError
from refold.inference import open_inference_pb2 as pb
from refold.inference import open_inference_pb2_grpc as service

__all__ = ["Servicer"]

log = logging.getLogger(__name__)
A = TypeVar("A")
DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}


def _answers(method: Callable[..., A]) -> Callable[..., A]:
    """A RefoldError becomes a status with its sentence; anything else INTERNAL with an id that is also in the log."""

    @functools.wraps(method)
    def guarded(self: Servicer, request: Any, context: grpc.ServicerContext) -> A:
        try:
            known(request)
            return method(self, request, context)
        except UnknownModelError as e:
            context.abort(grpc.StatusCode.NOT_FOUND, e.message)
        except (InputError, UsageError) as e:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, e.message)
        except RefoldError as e:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, e.message)
        except Exception:
            number = uuid.uuid4().hex[:12]
            log.exception("Request %s failed", number)
            context.abort(grpc.StatusCode.INTERNAL, f"The request failed inside Refold; the log has it under {number}.")
        raise AssertionError("abort raises")

    return guarded


class Servicer(service.GRPCInferenceServiceServicer):
    """One model over gRPC."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    @_answers
    def ServerLive(self, request: pb.ServerLiveRequest, context: grpc.ServicerContext) -> pb.ServerLiveResponse:  # noqa: N802
        return pb.ServerLiveResponse(live=True)

    @_answers
    def ServerReady(self, request: pb.ServerReadyRequest, context: grpc.ServicerContext) -> pb.ServerReadyResponse:  # noqa: N802
        return pb.ServerReadyResponse(ready=self._handlers.ready)

    @_answers
    def ModelReady(self, request: pb.ModelReadyRequest, context: grpc.ServicerContext) -> pb.ModelReadyResponse:  # noqa: N802
        self._handlers.check_model(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._handlers.ready)

    @_answers
    def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="refold", version=__version__, extensions=[])

    @_answers
    def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> pb.ModelMetadataResponse:
        handlers = self._handlers
        handlers.check_model(request.name, request.version)
        answer = pb.ModelMetadataResponse(name=handlers.name, versions=[handlers.version], platform=handlers.platform)
        for name, datatype, shape in handlers.inputs():
            answer.inputs.add(name=name, datatype=datatype, shape=shape)
        classes = handlers.bundle.manifest.class_count or -1
        answer.outputs.add(name=handlers.output_name, datatype="FP32", shape=[-1, classes])
        return answer

    @_answers
    def ModelInfer(self, request: pb.ModelInferRequest, context: grpc.ServicerContext) -> pb.ModelInferResponse:  # noqa: N802
        handlers = self._handlers
        check(request)
        result = handlers.infer(
            InferenceRequest(
                request.model_name,
                request.model_version,
                request.id,
                tuple(_tensors(request)),
                tuple(o.name for o in request.outputs),
            )
        )
        serving = result.serving
        answer = pb.ModelInferResponse(model_name=handlers.name, model_version=str(serving.release_version), id=request.id)
        answer.parameters["release_version"].int64_param = serving.release_version
        answer.parameters["domain"].string_param = serving.domain
        answer.parameters["overlay"].bool_param = serving.overlay
        if handlers.corrector is not None:
            answer.parameters["corrected"].int64_param = result.corrected
        output = answer.outputs.add(name=handlers.output_name, datatype="FP32", shape=result.logits.shape)
        if request.raw_input_contents:  # answered in the form it was asked
            answer.raw_output_contents.append(result.logits.astype("<f4").tobytes())
        else:
            output.contents.fp32_contents.extend(result.logits.ravel().tolist())
        return answer


def _tensors(request: pb.ModelInferRequest) -> list[Tensor]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"The request has {len(request.inputs)} inputs and {len(raw)} raw contents; they belong together.")
    return [_tensor(one, raw[i] if raw else None) for i, one in enumerate(request.inputs)]


def _tensor(one: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    dtype = DTYPES.get(one.datatype)
    if dtype is None:
        raise InputError(f"Input type {one.datatype or 'none'} is not served; send UINT8 pictures or FP32.")
    shape = tuple(one.shape)
    if not shape or any(n < 0 for n in shape):
        raise InputError(f"The shape {list(shape)} of input {one.name!r} is none.", code="wrong-size")
    values: NDArray[Any]
    if raw is not None:
        if one.HasField("contents"):
            raise InputError(f"Input {one.name!r} has both raw and typed contents; send one.")
        if len(raw) % dtype.itemsize:
            raise InputError(f"The raw contents of {one.name!r} end within a number.", code="wrong-size")
        values = np.frombuffer(raw, dtype)
    elif one.datatype == "FP32":
        values = np.array(one.contents.fp32_contents, dtype)
    else:
        wide = np.array(one.contents.uint_contents, np.uint32)
        if wide.size and wide.max() > 255:
            raise InputError(f"Input {one.name!r} is UINT8 and has a value of {wide.max()}.")
        values = wide.astype(dtype)
    count = 1
    for n in shape:
        count *= n
    if values.size != count:
        raise InputError(
            f"Input {one.name!r} has {values.size} values where its shape {list(shape)} wants {count}.", code="wrong-size"
        )
    return Tensor(one.name, one.datatype, values.reshape(shape))
