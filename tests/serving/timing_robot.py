"""A robot in a process of its own, as robots are: python -m tests.serving.timing_robot URL FRAMES SIDE.

Prints, as JSON, the milliseconds that every round trip took beyond the frame itself.
"""

from __future__ import annotations

import json
import sys
import time

from lac_vla.client.connection import Client
from tests.serving.conftest import observation


def main(url: str, frames: str, side: str) -> None:
    requests = [observation(i, side=int(side)) for i in range(4)]
    beyond = []
    with Client(url) as client:
        for i in range(int(frames)):
            begin = time.perf_counter()
            answer = client.infer(requests[i % 4])
            beyond.append(1e3 * (time.perf_counter() - begin) - sum(answer["lac"]["stages"].values()))
    print(json.dumps(beyond))


if __name__ == "__main__":
    main(*sys.argv[1:])
