"""Geometry of LIBERO's scenes, read from MuJoCo with privileged state."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]

COLLISION_GROUP = 0
MESH, SPHERE, CAPSULE, CYLINDER = 7, 2, 3, 5
WRIST_HEIGHT = 0.21
"""Height (m) of the wrist above the fingertips."""


class Simulation(Protocol):
    """MuJoCo's model and state, and the benchmark's environment over them."""

    @property
    def model(self) -> Any:
        """MuJoCo's model."""

    @property
    def data(self) -> Any:
        """MuJoCo's state."""

    @property
    def domain(self) -> Any:
        """The benchmark's environment."""


class LiberoScene:
    """Geometry of the simulated world, read from MuJoCo."""

    def __init__(self, env: Simulation) -> None:
        import mujoco

        self._mj = mujoco
        self.model, self.data = env.model, env.data
        self.body_of: dict[str, int] = dict(env.domain.obj_body_id)
        self._owners = [int(body) for body in self.model.geom_bodyid]
        parts = ("robot0", "gripper0", "mount0")
        self._robot = {g for g, body in enumerate(self._owners) if self.model.body(body).name.startswith(parts)}
        self._groups = np.zeros(6, dtype=np.uint8)
        self._groups[COLLISION_GROUP] = 1
        names = ("gripper0_finger_joint1", "gripper0_finger_joint2")
        self._fingers = [int(self.model.joint(name).qposadr[0]) for name in names]
        self.base = np.array(env.domain.robots[0].base_pos)
        self._site = int(env.domain.robots[0].eef_site_id)

    def position(self, name: str) -> FloatArray:
        """Origin of an object's body, or position of a site (a region of a fixture), (3,) m."""
        return np.array(self.data.xpos[self.body_of[name]] if name in self.body_of else self.data.site(name).xpos)

    @property
    def eef(self) -> FloatArray:
        """Point between the fingertips, (3,) m."""
        return np.array(self.data.site_xpos[self._site])

    @property
    def eef_rotation(self) -> FloatArray:
        """Orientation of the gripper, (3, 3)."""
        return np.array(self.data.site_xmat[self._site]).reshape(3, 3)

    @property
    def opening(self) -> float:
        """Distance of the fingers, m (0..0.08)."""
        return float(sum(abs(self.data.qpos[i]) for i in self._fingers))

    def reach(self, point: FloatArray) -> float:
        """Distance (m) from shoulder to wrist, gripper pointing down at ``point``; 0.69 is a straight arm."""
        outwards = float(np.hypot(*(point - self.base)[:2])) - 0.088
        return float(np.hypot(outwards, point[2] + WRIST_HEIGHT - self.base[2] - 0.333))

    def geoms(self, name: str) -> list[int]:
        """Collision geoms of an object and of everything attached to it."""
        bodies = {self.body_of[name]}
        for body in range(self.model.nbody):
            if int(self.model.body_parentid[body]) in bodies:
                bodies.add(body)
        groups = self.model.geom_group
        return [g for g, body in enumerate(self._owners) if body in bodies and groups[g] == COLLISION_GROUP]

    def points(self, name: str) -> FloatArray:
        """Vertices of meshes and corners of the boxes around other collision geoms, (N, 3) m, world."""
        model, data = self.model, self.data
        clouds = []
        for g in self.geoms(name):
            kind, size = int(model.geom_type[g]), model.geom_size[g]
            if kind == MESH:
                mesh = int(model.geom_dataid[g])
                start = int(model.mesh_vertadr[mesh])
                local = model.mesh_vert[start : start + int(model.mesh_vertnum[mesh])]
            else:
                half = {
                    SPHERE: (size[0], size[0], size[0]),
                    CAPSULE: (size[0], size[0], size[1] + size[0]),
                    CYLINDER: (size[0], size[0], size[1]),
                }.get(kind, tuple(size))
                local = np.array(np.meshgrid(*[(-h, h) for h in half])).reshape(3, -1).T
            clouds.append(local @ data.geom_xmat[g].reshape(3, 3).T + data.geom_xpos[g])
        return np.concatenate(clouds)

    def height(self, spot: FloatArray, ignore: set[int]) -> float:
        """Height (m) of the top surface at ``spot`` (2,), or -inf; neither the robot's nor ``ignore``'s."""
        origin, down = np.array([*spot, 2.0]), np.array([0.0, 0.0, -1.0])
        hit = np.array([-1], dtype=np.int32)
        for _ in range(64):
            distance = self._mj.mj_ray(self.model, self.data, origin, down, self._groups, 1, -1, hit)
            if distance < 0:
                break
            origin[2] -= distance
            if int(hit[0]) not in self._robot | ignore:
                return float(origin[2])
            origin[2] -= 1e-4
        return -np.inf
