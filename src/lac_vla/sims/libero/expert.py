"""A scripted expert for LIBERO with privileged state, made to be imitated.

It turns a task's goal into skills of the hand (:mod:`lac_vla.sims.libero.skills`), one after the other: take a bowl
by its rim or a box by its sides and put it somewhere, open and close drawers and doors, turn a knob, slide a plate.
Its actions are very nearly a function of the present state: a closed-loop motion (``Hand.funnel``) carries the
gripper to a point through a cone above it, wherever noise has taken it before; there are no waiting phases, and
ties in the choice of a grasp are always broken alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lac_vla.errors import InputError
from lac_vla.sims.libero.env import LiberoEnv
from lac_vla.sims.libero.scene import FloatArray, LiberoScene
from lac_vla.sims.libero.skills.hand import RETREAT, Hand, Skill
from lac_vla.sims.libero.skills.insert import Insert
from lac_vla.sims.libero.skills.joints import Joint, PullDrawer, PushDoor, PushDrawer, TurnKnob
from lac_vla.sims.libero.skills.pick_place import PickPlace
from lac_vla.sims.libero.skills.push import Slide
from lac_vla.sims.phase import Phase

Goal = Sequence[str]
"""A relation of a BDDL file: its name, and what it is about."""
ORDER = {"open": 0, "turnon": 1, "on": 2, "in": 2, "close": 3}
"""Relation → when it is seen to."""
UNSOLVED: dict[tuple[str, int], str] = {
    ("libero_10", 5): "a book that stands in the caddy's compartment is lower than its goal asks for",
}
"""(Suite, task) that the expert does not solve often enough to demonstrate it → why."""
UNCHANGED = ("libero_spatial", "libero_object")
"""Suites whose demonstrations stay as they were: bundled models have learned from them, and results name them."""
TRIES = 3
"""How often a skill whose goal does not hold afterwards is tried, before the next."""


class ScriptedExpert:
    """Solves the task that an environment is in.

        expert = ScriptedExpert(env)
        for action in expert.actions():
            env.advance(action)

    Args:
        env: An environment that has been reset.

    Raises:
        InputError: If it is one of :data:`UNSOLVED`, or a part of the task's goal is none that it knows.
    """

    def __init__(self, env: LiberoEnv) -> None:
        if reason := UNSOLVED.get((env.suite, env.task)):
            raise InputError(f"the scripted expert does not solve {env.suite} task {env.task}: {reason}")
        self._env = env
        self._hand = Hand(env)
        self.plan = list(self._make_plan(env.domain.parsed_problem["goal_state"]))
        self.step = 0

    @property
    def scene(self) -> LiberoScene:
        """Geometry of the world."""
        return self._hand.scene

    @property
    def phase(self) -> Phase:
        """The phase of the present skill."""
        return self._hand.phase

    @property
    def object(self) -> str:
        """Name of what is moved now: an object, a drawer's inside, a stove."""
        return self.plan[self.step][1].object

    @property
    def place(self) -> str:
        """Name of where it is moved to."""
        return self.plan[self.step][1].place

    @property
    def finished(self) -> bool:
        """Tell whether all is done but the last retreat."""
        return self.step == len(self.plan) - 1 and self.phase is Phase.RETREAT

    def actions(self) -> Iterator[FloatArray]:
        """Clean actions, (7,) each, every one computed from the state at the moment it is asked for.

        Endless after the gripper has retreated (it then stays where it is).
        """
        for step, (goal, skill) in enumerate(self.plan):
            self.step = step
            last = step == len(self.plan) - 1
            if not last and self._holds(goal):
                continue
            for _ in range(1 if last else TRIES):
                yield from skill.actions()
                for action in self._hand.retreat():
                    if not last and self.scene.eef[2] > self._hand.released[2] + RETREAT:
                        break
                    yield action
                if self._holds(goal):
                    break

    def _holds(self, goal: Goal) -> bool:
        return bool(self._env.domain._eval_predicate(goal))

    def _make_plan(self, goals: Sequence[Goal]) -> Iterator[tuple[Goal, Skill]]:
        """One skill after the other, each with the relation that must hold after it."""
        hand, objects = self._hand, self._env.domain.objects_dict
        for goal in sorted(goals, key=lambda goal: ORDER.get(goal[0], len(ORDER))):
            relation, first, last = goal[0], goal[1], goal[-1]
            drawer = last.endswith(("top_region", "middle_region", "bottom_region")) and "cabinet" in last
            if relation == "open" and drawer:
                yield goal, PullDrawer(hand, last)
            elif relation == "close" and drawer:
                yield goal, PushDrawer(hand, last)
            elif relation == "close" and last.startswith("microwave"):
                yield goal, PushDoor(hand, last)
            elif relation == "turnon":
                yield goal, TurnKnob(hand, last)
            elif relation == "on" and first.startswith("plate") and first in objects:
                yield goal, Slide(hand, first, last)
            elif relation in ("on", "in") and first in objects:
                if drawer and Joint(hand, last.replace("_region", "_level")).position > -0.1:
                    yield ("open", last), PullDrawer(hand, last)
                yield goal, self._put(goal, goals)
            else:
                raise InputError(
                    f"the scripted expert cannot solve {self._env.suite} task {self._env.task}: goal {goal}"
                )

    def _put(self, goal: Goal, goals: Sequence[Goal]) -> Skill:
        """Choose how to bring an object to its place."""
        hand, (_, thing, place) = self._hand, goal
        if place.endswith("heating_region"):
            return Insert(hand, thing, place)
        roomy = self._env.suite not in UNCHANGED
        return PickPlace(hand, thing, place, self._shift(goal, goals), roomy=roomy)

    def _shift(self, goal: Goal, goals: Sequence[Goal]) -> FloatArray:
        """Choose where in a place to let go, from its centre, (2,) m: objects that share it lie side by side."""
        place = goal[-1]
        if "cabinet" in place and place.endswith("_region"):
            out = -Joint(self._hand, place.replace("_region", "_level")).axis
            return np.asarray(0.02 * out[:2])
        if place.endswith("top_side"):
            return np.array([-0.05, 0.0])
        sharing: list[Any] = [other for other in goals if other[-1] == place]
        return np.array([0.09 * (sharing.index(goal) - (len(sharing) - 1) / 2.0), 0.0])
