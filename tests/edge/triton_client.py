"""An unmodified tritonclient in a process of its own (its descriptors clash with ours in one): prints JSON.

python triton_client.py ADDRESS MODEL IMAGES.npz COUNT [CA]     infers COUNT times, one picture after the other
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tritonclient.grpc as triton


def main(address: str, model: str, path: str, count: int, ca: str | None = None) -> None:
    client = triton.InferenceServerClient(address, ssl=ca is not None, root_certificates=ca)
    images = np.load(path)["images"]
    metadata = client.get_model_metadata(model, as_json=True)
    answers = []
    for i in range(count):
        image = images[i % len(images)][None]
        entry = triton.InferInput("input", list(image.shape), "UINT8")
        entry.set_data_from_numpy(image)
        answer = client.infer(model, [entry], outputs=[triton.InferRequestedOutput("logits")], request_id=str(i))
        response = answer.get_response()
        version = response.parameters["release_version"].int64_param
        assert response.id == str(i) and response.model_version == str(version)
        answers.append({"version": version, "logits": answer.as_numpy("logits")[0].tolist()})
    errors = []
    for name, shape, kind in ((model, [1, 4, 4, 3], "UINT8"), ("other", [1, 16, 16, 3], "UINT8"), (model, [1, 3], "INT32")):
        entry = triton.InferInput("input", shape, kind)
        entry.set_data_from_numpy(np.zeros(shape, np.uint8 if kind == "UINT8" else np.int32))
        try:
            client.infer(name, [entry])
        except triton.InferenceServerException as e:
            errors.append(str(e))
    errors += refused(client, model, images[:1])
    batch = triton.InferInput("input", [3, 16, 16, 3], "UINT8")
    batch.set_data_from_numpy(images[:3])
    json.dump(
        {
            "live": client.is_server_live(),
            "ready": client.is_server_ready() and client.is_model_ready(model),
            "server": client.get_server_metadata(as_json=True),
            "metadata": metadata,
            "answers": answers,
            "errors": errors,
            "batch": client.infer(model, [batch]).as_numpy("logits").tolist(),
        },
        sys.stdout,
    )


def refused(client: triton.InferenceServerClient, model: str, image: np.ndarray) -> list[str]:
    """What the server says to everything that this client can ask beyond tensors, in the order of test_oip.py."""
    entry = triton.InferInput("input", list(image.shape), "UINT8")
    entry.set_data_from_numpy(image)
    shared = triton.InferRequestedOutput("logits")
    shared.set_shared_memory("region", 64)
    asked = [
        {"outputs": [triton.InferRequestedOutput("logits", class_count=2)]}, {"priority": 2}, {"timeout": 1000},
        {"sequence_id": 7, "sequence_start": True}, {"parameters": {"mine": 1}}, {"outputs": [shared]}, {"model_version": "77"},
    ]  # fmt: skip
    errors = []
    for more in asked:
        try:
            client.infer(model, [entry], **more)
            errors.append("answered")
        except triton.InferenceServerException as e:
            errors.append(str(e))
    return errors


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
