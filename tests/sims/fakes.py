"""A SimplerEnv that is none: the real server file finds it in place of the simulator, and it misbehaves when told to.

A file in its folder named ``crash``, ``hang``, ``raise`` or ``scribble`` is an order for the next third step, one named
``fall`` or ``mutter`` for the next reset; it is obeyed once. Every ``gym.make`` is
noted in ``made``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lac_vla.sims.simpler.ms2 import SERVER, Ms2Backend

GYM = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np

__version__ = "0.29.1"
HERE = Path(__file__).parent
CHANGE = 3


def told(order):
    path = HERE / order
    if path.exists():
        path.unlink()
        return True
    return False


class Env:
    def __init__(self, env_id, kwargs):
        self.env_id, self.kwargs, self.steps, self.total = env_id, kwargs, 0, np.zeros(7)
        with (HERE / "made").open("a") as file:
            file.write(json.dumps([env_id, kwargs]) + "\\n")

    @property
    def unwrapped(self):
        return self

    @property
    def _scene(self):
        at = lambda height: SimpleNamespace(p=[0.0, 0.0, height])
        things = [("can", "dynamic", at(self.height)), ("arena", "static", at(0.0))]
        return SimpleNamespace(get_all_actors=lambda: [SimpleNamespace(name=n, type=t, pose=p) for n, t, p in things])

    @property
    def agent(self):
        return SimpleNamespace(get_gripper_closedness=lambda: 0.1 * self.steps)

    def get_language_instruction(self):
        return "open top drawer" if self.steps < CHANGE else "place apple into top drawer"

    def reset(self, options):
        self.options = options
        self.height = -18.0 if told("fall") else 0.9
        if told("mutter"):
            os.write(2, b"[svulkan2] [error] GLFW error: no display\\n[SAPIEN] [error] failed to load stage.glb\\n")
        print("a simulator talks")
        os.write(1, b"and so does its renderer")
        return self.look(), {}

    def step(self, action):
        self.steps += 1
        self.total = self.total + action
        if self.steps == 3:
            if told("crash"):
                print("segmentation fault, core not dumped", file=sys.stderr, flush=True)
                os._exit(139)
            if told("hang"):
                time.sleep(60)
            if told("raise"):
                raise RuntimeError("the physics exploded")
            if told("scribble"):
                os.write(MESSAGES, b"something that is no message at all")
        print("step", self.steps)
        success = self.steps in (4, 5)
        stats = {"is_src_obj_grasped": np.bool_(self.steps >= 2)}
        return self.look(), 0.0, success, False, {"success": np.bool_(success), "episode_stats": stats}

    def look(self):
        image = np.full((8, 10, 3), 100 + self.steps, dtype=np.uint8)
        image[0, 0] = np.clip(np.round(self.total[:3] * 100), 0, 255)
        return {"image": {"overhead_camera": {"rgb": image}, "3rd_view_camera": {"rgb": image}}}

    def close(self):
        pass


def make(env_id, **kwargs):
    global MESSAGES
    # The pipe for messages is the descriptor that was duplicated from 1 when the server began.
    MESSAGES = max(fd for fd in range(3, 32) if os.path.exists(f"/proc/self/fd/{fd}")
                   and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"))
    return Env(env_id, kwargs)
"""

ASSETS = """
import os

ASSET_DIR = os.environ["MS2_REAL2SIM_ASSET_DIR"]
"""


def install(folder: Path) -> Path:
    """Put the fake modules into a folder that is to be on the interpreter's path."""
    (folder / "mani_skill2_real2sim").mkdir(parents=True)
    (folder / "gymnasium.py").write_text(GYM, encoding="utf-8")
    (folder / "sapien.py").write_text('__version__ = "2.2.2"\n', encoding="utf-8")
    for name in ("__init__", "envs"):
        (folder / "mani_skill2_real2sim" / f"{name}.py").write_text(ASSETS, encoding="utf-8")
    return folder


def backend(folder: Path, **options: float) -> Ms2Backend:
    """The real client and server, with this interpreter."""
    return Ms2Backend((sys.executable, str(SERVER)), folder / "data", **options)  # type: ignore[arg-type]
