"""LIBERO's pictures: those that the benchmark returns, or cheaper ones, whenever they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from lac_vla.types import UInt8Image

Rendering: TypeAlias = Literal["fast", "official"]
Convention: TypeAlias = Literal["upright", "openvla"]

HIDDEN_GROUP: Final = 5
"""A geom group that the renderer leaves out."""
RENDERED_POSES: Final = (
    *("xpos", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)
"""Fields of ``MjData`` that a picture is made of."""


class Renderer:
    """Renders the scene of a robosuite environment.

    Args:
        env: The environment.
        resolution: Side of the square images in pixels.
        rendering: See :mod:`lac_vla.sims.libero.env`.
        convention: See :mod:`lac_vla.sims.libero.env`.
    """

    def __init__(self, env: Any, resolution: int, rendering: Rendering, convention: Convention) -> None:
        self._env, self._resolution, self._rendering, self._convention = env, resolution, rendering, convention
        self._poses: dict[str, npt.NDArray[np.float64]] = {}

    @property
    def _model(self) -> Any:
        return self._env.sim.model._model

    @property
    def _data(self) -> Any:
        return self._env.sim.data._data

    def note_poses(self, cache: dict[str, Any]) -> npt.NDArray[np.float64]:
        """Stand in for an image sensor: note what is where at the instant when the benchmark would render.

        That is not the end of a control step but up to two physics steps earlier. Rendering is left to
        :meth:`pictures`, which nobody may call; the pixels are the same.
        """
        self._poses = self._present()
        return np.zeros(1)

    def pictures(self, cameras: Iterable[str]) -> dict[str, UInt8Image]:
        """Images of that instant by camera, uint8, resolution × resolution × 3."""
        present = self._put(self._poses)
        try:
            return {camera: self._render(camera) for camera in cameras}
        finally:
            self._put(present)

    def open(self) -> None:
        """Prepare a freshly loaded model for ``fast`` rendering.

        Reflections and multisampling are turned off, which needs a MuJoCo rendering context of our own.
        """
        if self._rendering != "fast":
            return
        import mujoco as mj

        context, model = self._env.sim._render_context_offscreen, self._model
        context.gl_ctx.make_current()
        context.con.free()
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = self._resolution
        context.con = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_150)
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN, context.con)
        context.scn.flags[mj.mjtRndFlag.mjRND_REFLECTION] = 0

    def free(self) -> None:
        """Free the GL context now; the garbage collector would free objects of whichever is current then."""
        context = self._env.sim._render_context_offscreen
        if context is not None:
            context.gl_ctx.make_current()
            context.con.free()
            context.gl_ctx.free()
            self._env.sim._render_context_offscreen = None

    def _put(self, poses: dict[str, npt.NDArray[np.float64]]) -> dict[str, npt.NDArray[np.float64]]:
        """Put poses in place; those that were there."""
        present = self._present()
        for name, value in poses.items():
            getattr(self._data, name)[:] = value
        return present

    def _present(self) -> dict[str, npt.NDArray[np.float64]]:
        return {name: getattr(self._data, name).copy() for name in RENDERED_POSES}

    def _render(self, camera: str) -> UInt8Image:
        sim, model = self._env.sim, self._model
        sim._render_context_offscreen.gl_ctx.make_current()  # robosuite does not; other environments are open
        groups = model.geom_group.copy()
        if self._rendering == "fast":
            model.geom_group[self.out_of_view(camera)] = HIDDEN_GROUP
        try:
            raw = sim.render(camera_name=camera, width=self._resolution, height=self._resolution)
        finally:
            model.geom_group[:] = groups
        image = raw[::-1] if self._convention == "upright" else raw[::-1, ::-1]
        return np.ascontiguousarray(image)

    def out_of_view(self, camera: str) -> npt.NDArray[np.bool_]:
        """Geoms whose bounding sphere lies outside a camera's view, (ngeom,): MuJoCo would draw them all.

        Half of the triangles of a scene are the robot's, most of which the wrist camera never sees.
        """
        model, data = self._model, self._data
        k = model.camera(camera).id
        towards = (data.geom_xpos - data.cam_xpos[k]) @ data.cam_xmat[k].reshape(3, 3)  # x right, y up, z backwards
        half = np.deg2rad(model.cam_fovy[k]) / 2.0
        beyond = np.abs(towards[:, :2]) * np.cos(half) + towards[:, 2:] * np.sin(half)  # of the nearer side plane
        radius = np.where(model.geom_rbound > 0, model.geom_rbound, np.inf)  # planes have none
        return np.asarray((beyond.max(axis=1) > radius) | (towards[:, 2] > radius))
