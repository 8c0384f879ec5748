"""The original SimplerEnv in a process of its own, spoken to over its standard input and output.

It needs SAPIEN 2, numpy < 2 and gymnasium < 1, so it runs under another interpreter, as a plain file: only the standard
library, numpy and, once an episode begins, the simulator itself are imported here. :mod:`lac_vla.sims.simpler.ms2` is
the other end and imports the format from here.

Format. Every message, either way, is

==========================  =====================================================================================
bytes                       what
==========================  =====================================================================================
4                           ``LACS``
4 + 4                       lengths *h* and *a* of the two parts below, unsigned, little-endian
*h*                         a JSON object, UTF-8, at most 1 MiB; ``array`` in it is null or [dtype, shape]
*a*                         the array's numbers, C order, little-endian, at most 64 MiB: ``u1`` or ``f8``
==========================  =====================================================================================

Nothing is ever unpickled. Requests and what answers them:

* ``{"op": "hello"}`` → ``{"ok": true, "versions": {...}, "assets": folder}``
* ``{"op": "reset", "env": id, "kwargs": {...}, "options": {...}, "camera": name}`` → an observation. The environment is
  made anew, as SIMPLER's own evaluation does: what is drawn at random in it is then the same in every episode. The
  observation has ``"heights"``, too: object → metres, world
* ``{"op": "step"}`` with the action, ``f8`` (7,) → an observation
* ``{"op": "scene"}`` → ``{"ok": true}`` with the poses of tool, controller's target, object to take, goal and robot's
  base, ``f8`` (5, 4, 4), world; of a WidowX alone
* an observation is ``{"ok": true, "instruction": str, "success": bool, "grasped": bool, "opening": float}`` with the
  image, ``u1`` (H, W, 3)
* what fails is answered with ``{"ok": false, "error": str}``; the end of the input ends the process.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from importlib import import_module as load
from typing import Any

import numpy as np

MAGIC = b"LACS"
HEAD = struct.Struct("<4sII")
MAX_JSON, MAX_ARRAY = 1 << 20, 1 << 26
DTYPES = ("u1", "f8")


def pack(message: dict[str, Any], array: Any = None) -> bytes:
    """A message, JSON-serialisable, and an array, uint8 or float64, as bytes."""
    data = b""
    described = None
    if array is not None:
        array = np.ascontiguousarray(array)
        kind = array.dtype.newbyteorder("<").str[1:]
        if kind not in DTYPES:
            raise ValueError(f"arrays of {array.dtype} are not sent; only uint8 and float64")
        data, described = array.astype("<" + kind).tobytes(), [kind, list(array.shape)]
    text = json.dumps({**message, "array": described}).encode("utf-8")
    return HEAD.pack(MAGIC, len(text), len(data)) + text + data


def unpack(read: Callable[[int], bytes]) -> tuple[dict[str, Any], Any]:
    """The next message, and its array or ``None``; ``read`` gives exactly as many bytes as it is asked for.

    Raises:
        EOFError: If ``read`` raises it, because the other end is gone.
        ValueError: If what came is no message.
    """
    magic, text, data = HEAD.unpack(read(HEAD.size))
    if magic != MAGIC or text > MAX_JSON or data > MAX_ARRAY:
        raise ValueError("not a message of this format: something else writes to the pipe")
    said, raw = read(text), read(data)
    try:
        message = json.loads(said.decode("utf-8"))
        described = message.pop("array")
        if described is None:
            return message, None
        kind, shape = described
        if kind not in DTYPES:
            raise ValueError(f"arrays of {kind} are not taken")
        return message, np.frombuffer(raw, dtype="<" + kind).reshape(tuple(shape))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a message of this format: {error!r}"[:200]) from error


class Simulator:
    """Answers requests with the original SimplerEnv."""

    def __init__(self) -> None:
        self.env: Any = None
        self.camera = ""

    def hello(self, request: dict[str, Any], action: Any) -> tuple[dict[str, Any], Any]:
        """The versions of what is installed."""
        package = load("mani_skill2_real2sim")
        load("mani_skill2_real2sim.envs")
        versions = {name: getattr(load(name), "__version__", "?") for name in ("numpy", "gymnasium", "sapien")}
        told = {"python": sys.version.split()[0], **versions}
        return {"versions": told, "assets": os.path.abspath(str(package.ASSET_DIR))}, None

    def reset(self, request: dict[str, Any], action: Any) -> tuple[dict[str, Any], Any]:
        """Make the environment and start its episode."""
        load("mani_skill2_real2sim.envs")  # registers the environments
        if self.env is not None:
            self.env.close()
            self.env = None
        self.camera = request["camera"]
        self.env = load("gymnasium").make(request["env"], **request["kwargs"])
        observation, _ = self.env.reset(options=request["options"])
        things = [thing for thing in self.env.unwrapped._scene.get_all_actors() if thing.type == "dynamic"]
        seen, image = self._look(observation, {})
        return {**seen, "heights": {thing.name: float(thing.pose.p[2]) for thing in things}}, image

    def step(self, request: dict[str, Any], action: Any) -> tuple[dict[str, Any], Any]:
        """Execute an action."""
        if self.env is None:
            raise ValueError("reset before the first step")
        observation, _, _, _, info = self.env.step(np.array(action))
        return self._look(observation, info)

    def scene(self, request: dict[str, Any], action: Any) -> tuple[dict[str, Any], Any]:
        """The truth about a WidowX's scene."""
        inner = self.env.unwrapped
        arm, base = inner.agent.controller.controllers["arm"], inner.agent.robot.pose
        poses = [
            arm.ee_link.pose,
            base * arm._target_pose,
            inner.episode_source_obj.pose,
            inner.episode_target_obj.pose,
        ]
        return {}, np.stack([pose.to_transformation_matrix() for pose in [*poses, base]]).astype(np.float64)

    def _look(self, observation: Any, info: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        seen = {
            "instruction": str(self.env.unwrapped.get_language_instruction()),
            "success": bool(info.get("success", False)),
            "grasped": bool(info.get("episode_stats", {}).get("is_src_obj_grasped", False)),
            "opening": float(np.clip(1.0 - self.env.unwrapped.agent.get_gripper_closedness(), 0.0, 1.0)),
        }
        return seen, observation["image"][self.camera]["rgb"]


def answer(simulator: Simulator, request: dict[str, Any], array: Any) -> bytes:
    """Answer a request, as bytes."""
    try:
        if request["op"] not in ("hello", "reset", "step", "scene"):
            raise ValueError(f"unknown request {request['op']!r}")
        message, image = getattr(simulator, request["op"])(request, array)
    except Exception as error:  # whatever it is, the other end must hear of it
        return pack({"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]})
    return pack({"ok": True, **message}, image)


def serve(simulator: Simulator) -> None:
    """Answer requests until the other end is gone.

    What the simulator itself prints goes to standard error: the pipe is for messages alone.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = sys.stdin.buffer

    def read(n: int) -> bytes:
        data = source.read(n)
        if len(data) < n:
            raise EOFError
        return data

    while True:
        try:
            request, array = unpack(read)
        except EOFError:
            return
        out.write(answer(simulator, request, array))
        out.flush()


if __name__ == "__main__":
    # Run as a file, Python looks here first for modules; names of this folder must not hide others'.
    sys.path = [folder for folder in sys.path if os.path.abspath(folder) != os.path.dirname(os.path.abspath(__file__))]
    serve(Simulator())
