"""A bundle's classifier on LitServe, for ``serve.py``: a process for HTTP, and one that computes batches."""

# Without "from __future__ import annotations": LitServe reads the annotations of decode_request and encode_response.
import base64
import io
import sys
from typing import Any

import litserve as ls
import numpy as np
import torch
from serve import fused

from raypp.bundle.load import load_private

MAX_BATCH = 64


class Classifier(ls.LitAPI):  # type: ignore[misc]
    bundle = sys.argv[1] if len(sys.argv) > 1 else ""

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)  # as args.threads of the service
        self.classes = load_private(self.bundle).classes
        self.network = fused(self.bundle)

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return np.load(io.BytesIO(base64.b64decode(request["image"])))

    def batch(self, inputs: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(inputs)).permute(0, 3, 1, 2)

    def predict(self, images: torch.Tensor) -> list[Any]:
        with torch.inference_mode():
            top = torch.softmax(self.network(images.float() / 255), dim=1).topk(5, dim=1)
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return {"top": [{"class": self.classes[k], "probability": p} for k, p in zip(*output, strict=True)]}


if __name__ == "__main__":
    api = Classifier(max_batch_size=MAX_BATCH, batch_timeout=0.0, api_path="/classify")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
