"""The substeps of a control step, for less, against MuJoCo's own calls: a small world of things that collide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lac_vla.sims.libero.physics import Physics

mujoco = pytest.importorskip("mujoco")

BOX = '<body pos="{x} 0 {z}"><freejoint/><geom type="box" size=".04 .03 .02" condim="4"/></body>'
WORLD = f"""
<mujoco><option timestep="0.002" cone="elliptic"/>
<worldbody><geom type="plane" size="1 1 .1"/>
{"".join(BOX.format(x=0.03 * k, z=0.05 + 0.05 * k) for k in range(4))}
<body name="slab" pos="0 .2 .05"><geom type="box" size=".1 .1 .02"/></body>
<body pos="0 0 .4"><joint name="lift" type="slide" axis="0 0 1" damping="3"/>
<geom type="capsule" size=".02" fromto="-.1 0 0 .1 0 0"/><site name="wrist"/></body></worldbody>
<actuator><motor joint="lift"/></actuator><sensor><force site="wrist"/></sensor></mujoco>
"""
SUBSTEPS = 25


def _simulation() -> Any:
    """Make what robosuite makes of a model, as far as :class:`Physics` looks."""
    model = mujoco.MjModel.from_xml_string(WORLD)
    data = mujoco.MjData(model)
    return SimpleNamespace(
        model=SimpleNamespace(_model=model),
        data=SimpleNamespace(_data=data),
        forward=lambda: mujoco.mj_forward(model, data),
        step=lambda: mujoco.mj_step(model, data),
    )


def _substeps(sim: Any, move: Callable[[int], None] = lambda k: None) -> list[bytes]:
    """Run the calls of one control step in robosuite's order; all that is seen on the way."""
    data, seen = sim.data._data, []
    for k in range(SUBSTEPS):
        sim.forward()
        move(k)
        sim.forward()
        seen.append(data.sensordata.tobytes())
        data.ctrl[0] = 20.0 * np.sin(data.time * 9.0) - 10.0 - data.qvel[-1]
        sim.step()
        state = (data.qpos, data.qvel, data.qacc, data.qacc_warmstart, data.sensordata, data.xpos, data.xquat)
        seen += [part.tobytes() for part in state]
    return seen


def _thrown(sim: Any, rng: np.random.Generator) -> None:
    """Put the boxes somewhere else, turned anyhow: half of such quaternions are moved by being normalized twice."""
    data = sim.data._data
    for k in range(4):
        data.qpos[7 * k + 3 : 7 * k + 7] = rng.normal(size=4)
        data.qpos[7 * k + 2] = rng.uniform(0.03, 0.15)


def test_substeps_equal_mujocos_own_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = _simulation(), _simulation()
    physics = Physics(ours)
    short = []
    forward_skip = mujoco.mj_forwardSkip
    monkeypatch.setattr(mujoco, "mj_forwardSkip", lambda *args: (short.append(1), forward_skip(*args)))
    draws = np.random.default_rng(0), np.random.default_rng(0)
    contacts = 0
    for step in range(40):
        if step % 4 == 0:
            for sim, rng in zip((ours, theirs), draws, strict=True):
                _thrown(sim, rng)
        with physics.control_step():
            mine = _substeps(ours)
        assert mine == _substeps(theirs), step
        contacts += ours.data._data.ncon
    assert contacts > 300
    assert 0.5 * 40 * SUBSTEPS < len(short) < 40 * SUBSTEPS, "nearly always short, and not where it would not be exact"


def test_what_moves_between_two_forwards_is_seen_if_it_is_said() -> None:
    ours, theirs = _simulation(), _simulation()
    physics = Physics(ours)

    def push(sim: Any) -> Callable[[int], None]:
        slab = sim.model._model.body("slab").id

        def move(k: int) -> None:
            sim.model._model.body_pos[slab, 1] -= 2e-4
            sim.data._data.qpos[0] += 1e-4
            physics.moved()

        return move

    for step in range(20):
        with physics.control_step():
            mine = _substeps(ours, push(ours))
        assert mine == _substeps(theirs, push(theirs)), step


def test_outside_of_a_control_step_every_forward_is_a_full_one() -> None:
    sim = _simulation()
    physics = Physics(sim)
    data = sim.data._data

    def interrupted() -> None:
        with physics.control_step():
            sim.forward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for height in (0.5, 0.7):
        data.qpos[2] = height
        sim.forward()
        assert data.xpos[1, 2] == height


def test_a_state_that_has_diverged_is_given_up_as_by_mujoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings where it stands
    ours, theirs = _simulation(), _simulation()
    physics = Physics(ours)
    for sim in (ours, theirs):
        sim.data._data.qvel[-1] = 2e10
    with physics.control_step():
        mine = _substeps(ours)
    assert mine == _substeps(theirs)
    warned = [sim.data._data.warning[mujoco.mjtWarning.mjWARN_BADQVEL].number for sim in (ours, theirs)]
    assert warned == [1, 1]
