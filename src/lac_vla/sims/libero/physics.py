"""A control step's physics for less time, equal to the bit: what has the same inputs is not computed anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 1e20
"""Square of the value beyond which MuJoCo takes a position or velocity for diverged (``mjMAXVAL``)."""


class Physics:
    """Stands in for ``forward`` and ``step`` of one robosuite simulation (``MjSim``).

    Robosuite computes MuJoCo's forward dynamics three times in each of the 25 substeps of a control step: before its
    controller, in its controller, and in ``mj_step``. Only torques differ between the three. They enter at MuJoCo's
    last stage (accelerations); kinematics, collisions, masses, the constraints' rows and bias forces are functions of
    positions and velocities, and dominate. So in the second and third forward only the last stage runs.

    Why that is exact:

    * All three solves of the constraints stay, in their order: each starts from the result of the one before
      (``qacc_warmstart``) and ends with other last bits if one is left out.
    * A forward is no pure function: MuJoCo 2.3 normalizes the quaternions in ``qpos``, in place, and to normalize
      once more may move the last bit of what is normalized. A forward is followed by a short one only if that
      leaves ``qpos`` as it is, as it does in nearly all substeps.
    * ``mj_step2`` is ``mj_step`` from the last stage on, for every integrator but RK4 (LIBERO's is Euler). What
      ``mj_step`` asks first, whether positions or velocities diverged, is asked here; if so, it runs whole.
    * Sensors are those of the last stage (LIBERO's two, force and torque at the wrist), or depend on what the full
      forward has already computed.
    * All this within :meth:`control_step` alone, and from a substep's first forward, which is full, to its ``mj_step``.
      Who moves something in between says so (:meth:`moved`); outside, all calls are MuJoCo's own.

    Args:
        sim: The simulation, freshly loaded.
    """

    def __init__(self, sim: Any) -> None:
        import mujoco

        self._mj, self._sim = mujoco, sim
        self._velocities = mujoco.mjtStage.mjSTAGE_VEL
        self._inside = self._known = False
        sim.forward, sim.step = self.forward, self.step

    @contextmanager
    def control_step(self) -> Iterator[None]:
        """Allow short forwards while robosuite's ``env.step`` runs."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = self._known = False

    def moved(self) -> None:
        """Make the next forward a full one: something was moved between two forwards of a substep."""
        self._known = False

    def forward(self) -> None:
        """Compute all that follows from the present state, as ``mj_forward``."""
        model, data = self._sim.model._model, self._sim.data._data
        if self._known:
            self._mj.mj_forwardSkip(model, data, self._velocities, False)
            return
        self._mj.mj_forward(model, data)
        if self._inside:
            again = data.qpos.copy()
            self._mj.mj_normalizeQuat(model, again)
            self._known = again.tobytes() == data.qpos.tobytes()

    def step(self) -> None:
        """Advance by one step of the physics, as ``mj_step``."""
        model, data = self._sim.model._model, self._sim.data._data
        qpos, qvel = data.qpos, data.qvel
        if self._known and qpos @ qpos < LARGE and qvel @ qvel < LARGE:  # false for NaN, too
            self._mj.mj_step2(model, data)
        else:
            self._mj.mj_step(model, data)
        self._known = False
