"""Disturbances: the same for every method, each doing what its name says and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.engine.scenes import frame

from lac_vla.errors import InputError
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.disturbances import Drift, Long
from lac_vla.evaluation.stress import STRESSES, Stressed, describe_stress, make_stress
from lac_vla.sims.base import Env
from lac_vla.sims.simpler.benchmark import Simpler
from lac_vla.types import Frame

OTHERS = ("pick up the bowl", "open the drawer", "push the plate")


NO_OP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.5)


class Still(Env):
    """A task in which nothing moves; or, with ``moving``, in which every frame is another."""

    suite, task, instruction, horizon, no_op = "libero_spatial", 3, OTHERS[0], 90, NO_OP

    def __init__(self, moving: bool = False) -> None:
        self.moving = moving
        self.actions: list[Any] = []
        self.slides: list[tuple[float, float]] = []

    def slide_target(self, speed: float, rng: np.random.Generator) -> None:
        self.slides.append((speed, rng.random()))

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.actions = []
        return self._frame()

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        self.actions.append(action)
        return self._frame(), False

    def _frame(self) -> Frame:
        seen = frame(len(self.actions) if self.moving else 0, cameras=("agentview", "wrist"))
        proprio = np.array([len(self.actions)], dtype=np.float32)
        return replace(seen, instruction=self.instruction, proprio=proprio)


def episode(name: str, init_state: int = 0, *, seed: int = 0, moving: bool = False) -> list[Frame]:
    env = Stressed(Still(moving), make_stress(name), seed, OTHERS)
    frames = [env.reset(init_state)]
    return frames + [env.step(np.zeros(7))[0] for _ in range(env.horizon)]


def same(one: list[Frame], other: list[Frame]) -> bool:
    return all(
        a.instruction == b.instruction and all(np.array_equal(a.images[c], b.images[c]) for c in a.images)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", STRESSES)
def test_every_method_sees_the_same_and_every_trial_its_own(name: str) -> None:
    frames = episode(name, moving=True)
    assert same(frames, episode(name, moving=True))
    if name not in ("long", "moving"):
        assert not same(frames, episode(name, moving=True, init_state=1))
        assert not same(frames, episode(name, moving=True, seed=1))
    true = Still(moving=True).reset(0)
    for seen in frames:
        assert seen.shapes == true.shapes
        assert all(image.dtype == np.uint8 for image in seen.images.values())
    assert [float(seen.proprio[0]) for seen in frames if seen.proprio is not None] == list(range(len(frames)))


@pytest.mark.parametrize("name", sorted(set(STRESSES) - {"long", "instruction", "moving"}))
def test_images_change_and_the_instruction_does_not(name: str) -> None:
    frames, true = episode(name, moving=True), [Still(moving=True).reset(0)]
    env = Still(moving=True)
    env.reset(0)
    true += [env.step(np.zeros(7))[0] for _ in frames[1:]]
    changed = [
        not np.array_equal(a.images["agentview"], b.images["agentview"]) for a, b in zip(frames, true, strict=True)
    ]
    assert any(changed)
    assert {seen.instruction for seen in frames} == {OTHERS[0]}
    if name in ("lighting", "occlusion"):
        assert sum(changed) == pytest.approx(30, abs=1), "a while, and then all is as before"
    if name == "occlusion":
        assert all(np.array_equal(a.images["wrist"], b.images["wrist"]) for a, b in zip(frames, true, strict=True))


def test_drift_stays_below_a_grey_level_per_frame_and_adds_up() -> None:
    frames = [seen.images["agentview"].astype(int) for seen in episode("drift")]
    assert np.array_equal(frames[0], Still().reset(0).images["agentview"])
    steps = [np.abs(after - before) for before, after in pairwise(frames)]
    assert max(step.max() for step in steps) == 1, "of any pixel"
    assert max(step.mean() for step in steps) < 0.6, "of the image: no frame holds a jump of all pixels"
    assert np.abs(frames[-1] - frames[0]).max() > 25
    assert Drift().rate < 1


def test_shake_moves_the_picture_without_moving_it_away() -> None:
    frames = episode("shake")
    assert all(not np.array_equal(a.images["wrist"], b.images["wrist"]) for a, b in pairwise(frames))


def test_another_instruction_for_a_while() -> None:
    told = [seen.instruction for seen in episode("instruction")]
    other = [step for step, text in enumerate(told) if text != OTHERS[0]]
    assert len(other) == 10
    assert other == list(range(other[0], other[0] + 10))
    assert len({told[step] for step in other}) == 1
    with pytest.raises(InputError, match="two different instructions"):
        Stressed(Still(), make_stress("instruction"), 0, OTHERS[:1]).reset(0)


def test_dropped_frames_are_those_of_an_earlier_step() -> None:
    env = Still(moving=True)
    true = [env.reset(0)] + [env.step(np.zeros(7))[0] for _ in range(90)]
    delays = []
    for step, seen in enumerate(episode("drops", moving=True)):
        sources = [k for k in range(5) if k <= step and same([true[step - k]], [seen])]
        delays.append(sources[0])
    assert delays[0] == 0
    assert {0, 1, 4} <= set(delays)
    assert 0.1 < np.mean(np.array(delays) > 0) < 0.4


def test_a_robot_that_is_held_gets_its_whole_horizon_afterwards() -> None:
    inner = Still()
    env = Stressed(inner, Long(hold=4), 0)
    env.reset(0)
    assert env.horizon == inner.horizon + 4
    for _ in range(6):
        env.step(np.ones(7))
    assert [list(action) for action in inner.actions] == 4 * [list(NO_OP)] + 2 * [[1.0] * 7]


def test_a_target_slides_at_the_speed_that_was_asked_for_and_the_same_way_for_every_method() -> None:
    inner = Still()
    for init_state in (0, 0, 1):
        Stressed(inner, make_stress("moving:speed=0.05"), 0).reset(init_state)
    Stressed(inner, make_stress("moving"), 1).reset(0)
    assert [speed for speed, _ in inner.slides] == [0.05, 0.05, 0.05, 0.02]
    first, again, other, seeded = (draw for _, draw in inner.slides)
    assert first == again
    assert len({first, other, seeded}) == 3
    for name in set(STRESSES) - {"moving"}:
        Stressed(inner, make_stress(name), 0, OTHERS).reset(0)
    assert len(inner.slides) == 4, "no other stress moves the world"


@pytest.mark.parametrize("text", ["moving:speed=0", "moving:speed=-1", "moving:speed=nan", "moving:speed=fast"])
def test_a_speed_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"metres a second in \(0, 0.2\]|it must be a number"):
        make_stress(text)


def test_a_setting_that_a_stress_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="no setting 'sped'; it has: speed"):
        make_stress("moving:sped=0.1")
    with pytest.raises(InputError, match="no setting 'shift'; it has: nothing"):
        make_stress("shake:shift=1")


def test_targets_slide_where_the_simulator_can_move_them(tmp_path: Path) -> None:
    config = EvalConfig("model", tmp_path, ("dense",), stress="moving")
    assert config.stress == "moving"
    with pytest.raises(InputError, match="simpler-vm has no targets that can slide"):
        replace(config, benchmark=Simpler("simpler-vm"))


class Lazy(Still):
    """It counts the frames that somebody looked at."""

    looked = 0

    def tick(self, action: npt.ArrayLike) -> tuple[Callable[[], Frame], bool]:
        self.actions.append(action)

        def look() -> Frame:
            self.looked += 1
            return self._frame()

        return look, False


@pytest.mark.parametrize("name", STRESSES)
def test_a_world_that_nobody_looks_at_shows_the_same_later(name: str) -> None:
    world = Lazy(moving=True)
    env = Stressed(world, make_stress(name), 0, OTHERS)
    frames = [env.reset(0)]
    for step in range(env.horizon):
        look, _ = env.tick(np.zeros(7))
        if step % 5 == 4:
            frames.append(look())
    assert same(frames, episode(name, moving=True)[::5])
    everything = name not in ("long", "moving")  # those change no picture: none is rendered in vain
    assert world.looked == (env.horizon if everything else env.horizon // 5)


def test_names() -> None:
    with pytest.raises(InputError, match="shake, lighting, drift, occlusion, instruction, drops, long"):
        make_stress("earthquake")
    for name in STRESSES:
        text = describe_stress(name)
        assert name in text
        assert all(field.name in text for field in fields(make_stress(name)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reset"):
        Stressed(Still(), make_stress("drift"), 0).step(np.zeros(7))
