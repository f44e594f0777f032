"""The peer of a live node: a policy behind HTTP, POST an image's bytes and a state, to /act for a chunk as JSON.

An image that is posted to /see is encoded for the next history, as a node does with the images that it does not act on.

python -m benchmarks.act_server CHECKPOINT PORT INFERENCE_STEPS
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import torch

from dita.policy.fast import PolicySession
from dita.policy.policy import DitaPolicy
from dita.types import RawObservation
from robot_io.nodes.serve import keep_memory


def main(checkpoint: str, port: int, steps: int) -> None:
    """Serve until killed."""
    keep_memory()
    torch.set_num_threads(1)
    session = PolicySession(DitaPolicy.from_pretrained(checkpoint), num_inference_steps=steps)
    camera = session.policy.specs[session.embodiment].cameras[0]
    history: list[RawObservation] = []

    class Act(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            values = json.loads(self.headers["X-Observation"])
            image = np.frombuffer(self.rfile.read(int(self.headers["Content-Length"])), np.uint8)
            state = np.array(values["state"], np.float32)
            images = {camera.name: image.reshape(camera.height, camera.width, 3)}
            history[:] = [*history[-1:], RawObservation(images, state, values["instruction"], values["stamp"])]
            began = time.perf_counter()
            if self.path == "/see":
                session.look(history[-1])
                answer = {}
            else:
                answer = {"actions": session.predict(history, seed=0).values.tolist()}
            answer["seconds"] = time.perf_counter() - began
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    HTTPServer(("127.0.0.1", port), Act).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
