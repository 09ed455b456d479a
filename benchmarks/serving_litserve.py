"""The decoder behind LitServe with its batching, as its documentation shows it: what serving_fastapi.py does.

python benchmarks/serving_litserve.py ARTIFACT PORT NUM_PROCESSES
"""

from __future__ import annotations

import sys

import litserve
import numpy as np
from fastapi import Response
from serving_cases import ROWS_A_REQUEST
from serving_fastapi import MOST_ROWS, WAIT_S, Decoder, npy


class Api(litserve.LitAPI):
    def __init__(self, path: str, **options: object) -> None:
        super().__init__(**options)
        self.path = path

    def setup(self, device: str) -> None:
        self.decoder = Decoder(self.path)

    def decode_request(self, request: dict[str, int]) -> tuple[int, int]:
        return request["num_samples"], request["seed"]

    def batch(self, inputs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return inputs

    def predict(self, x: list[tuple[int, int]]) -> list[np.ndarray]:
        return self.decoder.samples(x)

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(npy(output), media_type="application/octet-stream")


def main() -> None:
    path, port, num_processes = sys.argv[1:]
    api = Api(path, max_batch_size=MOST_ROWS // ROWS_A_REQUEST, batch_timeout=WAIT_S, api_path="/sample")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(num_processes))
    server.run(host="127.0.0.1", port=int(port), log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
