"""A robot with openpi's own client, run by a Python that has it: python openpi_robot.py URL [KEY]."""

import json
import sys

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main(url, key=None):
    client = WebsocketClientPolicy(url, api_key=key)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    answers = []
    observation = {
        "observation/image": image,
        "observation/wrist_image": image[::-1],
        "observation/state": np.arange(8.0),
        "prompt": "pick up the bowl",
    }
    for _ in range(2):
        answer = client.infer(observation)
        answers.append({key: value for key, value in answer.items() if key != "actions"})
        answers[-1] |= {"actions": answer["actions"].tolist(), "dtype": answer["actions"].dtype.str}
        client.reset()
    try:
        client.infer({"prompt": "nothing to see"})
    except RuntimeError as error:
        complaint = str(error)
    told = {"metadata": client.get_server_metadata(), "answers": answers, "complaint": complaint}
    after = client.infer(observation)["actions"].shape  # a wrong observation does not end the session
    print(json.dumps({**told, "after": after}))


main(*sys.argv[1:])
