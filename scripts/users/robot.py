"""A robot asks a server, under its own image keys: ``python robot.py PORT``; by openpi's client if it is here."""

from __future__ import annotations

import sys

import numpy as np

try:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    kind, robot = "openpi's client", WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
except ModuleNotFoundError:
    from lac_vla.client.connection import Client

    kind, robot = "this library's client, in openpi's protocol", Client(f"ws://127.0.0.1:{sys.argv[1]}")

image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
for step in range(4):
    image[20:36, 4 * step : 4 * step + 12] = (200, 60, 40)
    answer = robot.infer(
        {"front": image, "gripper": image, "joints": np.zeros(8, np.float32), "prompt": "put the bowl on the plate"}
    )
    assert np.isfinite(answer["actions"]).all()
print(f"{kind}: {answer['actions'].shape} actions, {answer['lac']['ratio']:.0%} reused")
assert answer["lac"]["ratio"] > 0
