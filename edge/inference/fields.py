"""What a request asks for beyond tensors: nothing of it is served here, so each is refused by name, never ignored.

The protocol's parameters are extensions that a server lists in its metadata; this one lists none. Triton's clients send
`sequence_id`, `priority` and `timeout` for a request, `classification` and shared memory for a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from refold.errors import InputError
from refold.inference import open_inference_pb2 as pb

__all__ = ["check", "known"]

CONTENTS = {"UINT8": "uint_contents", "FP32": "fp32_contents"}


def check(request: pb.ModelInferRequest) -> None:
    """Of a request to infer, all within it. Raises InputError: a parameter, a field of another version of the protocol, or
    contents of another type than said."""
    for where, message in _messages(request):
        known(message, where)
    parameters = [("The request", request.parameters)]
    parameters += [(f"Input {one.name!r}", one.parameters) for one in request.inputs]
    parameters += [(f"Output {one.name!r}", one.parameters) for one in request.outputs]
    for where, given in parameters:
        if names := sorted(given):
            more = "parameters" if len(names) > 1 else "parameter"
            raise InputError(
                f"{where} carries the {more} {', '.join(map(repr, names))}, which this server does not support: leave it out.",
                code="unsupported",
            )
    for one in request.inputs:
        used = [field.name for field, _ in one.contents.ListFields()]
        wanted = CONTENTS.get(one.datatype)
        if wanted is not None and (strange := [name for name in used if name != wanted]):
            raise InputError(f"Input {one.name!r} is {one.datatype}, so its contents are {wanted}, not {strange[0]}.")


def known(message: Message, where: str = "The request") -> None:
    """Raises InputError: a field of another version of the protocol."""
    unknown: Any = UnknownFieldSet(message)  # its stub lacks what it does
    for one in unknown:
        raise InputError(
            f"{where} has a field {one.field_number} that this server does not know: nothing is ignored, leave it out.",
            code="unsupported",
        )


def _messages(request: pb.ModelInferRequest) -> Iterator[tuple[str, Message]]:
    for one in request.inputs:
        yield f"Input {one.name!r}", one
        yield f"The contents of input {one.name!r}", one.contents
    for out in request.outputs:
        yield f"Output {out.name!r}", out
