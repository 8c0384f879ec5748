"""A first action: the bundled model with its learned policy, on a picture in which one patch moves."""

import numpy as np

from lac_vla import CachedVLA, Frame

vla = CachedVLA.from_pretrained("mini", policy="lac")  # bundled; or a checkpoint's folder or hub id
robot = vla.session()  # one robot: owns the cache

picture = np.full((224, 224, 3), 120, np.uint8)
for step in range(6):
    camera = picture.copy()
    camera[80:120, 20 * step : 20 * step + 40] = (200, 60, 40)  # something moves
    frame = Frame({"agentview": camera, "wrist": camera}, "pick up the black bowl", np.zeros(8, np.float32))
    action = robot.act(frame)  # float32, (7,): the robot's own units
    info = robot.last_info
    print(f"{info.ratio:4.0%} reused, {info.timings['observation_to_action']:5.1f} ms", info.dense_reason or "")

robot.reset()  # a new episode: the cache is empty again
