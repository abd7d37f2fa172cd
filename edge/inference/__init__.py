"""The Open Inference Protocol, version 2 (KServe), over gRPC: existing clients talk to the device as to any model server.

handlers.py    what the calls mean, without a protocol
fields.py      what a request may not carry, as it would be ignored
servicer.py    protobuf in, protobuf out, errors to status codes
server.py      port, TLS, health, reflection
"""

from edge.inference.handlers import Handlers, InferenceRequest, InferenceResult, Tensor
from edge.inference.server import InferenceServer

__all__ = ["Handlers", "InferenceRequest", "InferenceResult", "InferenceServer", "Tensor"]
