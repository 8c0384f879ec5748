"""A robot's side of ``lac serve``: ``python robot_client.py [ws://HOST:PORT]``. openpi's client works as well.

Start the server first: ``lac serve --model mini --policy lac --port 8000``.
"""

import sys

import numpy as np

from lac_vla.client.connection import Client


def observe(step: int) -> dict:
    """Stand in for a robot's cameras and joints; the keys are openpi's for LIBERO."""
    camera = np.full((224, 224, 3), 120, np.uint8)
    camera[80:120, 20 * step : 20 * step + 40] = (200, 60, 40)
    return {
        "observation/image": camera,
        "observation/wrist_image": camera,
        "observation/state": np.zeros(8, np.float32),
        "prompt": "pick up the black bowl",
    }


with Client(sys.argv[1] if len(sys.argv) > 1 else "ws://127.0.0.1:8000") as server:
    print(server.metadata["model"], "with", server.metadata["method"])
    server.reset()  # a new episode begins with the next observation
    for step in range(6):
        answer = server.infer(observe(step))
        print(answer["actions"][0].round(3), f"{answer['lac']['ratio']:.0%} reused")
