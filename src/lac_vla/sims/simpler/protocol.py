"""SIMPLER's evaluation protocol as data: every episode of its three setups.

=============  ========  ==================================================================
setup          episodes  what
=============  ========  ==================================================================
``vm``         864       Google robot, visual matching: photos as background, 4 arm colours
``va``         1722      Google robot, variant aggregation: 7 to 9 variants of each scene
``widowx``     96        WidowX, visual matching
=============  ========  ==================================================================

Source: the scripts ``rt1_*.sh`` and ``openvla_bridge.sh`` and the table tool ``calc_metrics_evaluation_videos.py`` of
``simpler-env/SimplerEnv``. The tool leaves out the two changes of camera that the scripts of variant aggregation also
run; so does this module. The environments themselves hold which objects lie where in a numbered layout (``layout``: 60
of *move near*, 24 of each WidowX task), so no coordinates of those stand here. CogACT's own script gives all WidowX
tasks 120 steps, where SIMPLER's gives 60 and eggplant 120, as here: scores are compared at the same horizon only.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import Final

import numpy as np

from lac_vla.errors import InputError
from lac_vla.sims.simpler.episode import (
    GOOGLE,
    SETUPS,
    WIDOWX,
    EpisodeSpec,
    Option,
    Setup,
    Stand,
    TaskSpec,
    Variant,
)


@functools.cache
def episodes(setup: Setup) -> tuple[EpisodeSpec, ...]:
    """All episodes of a setup, task by task."""
    return tuple(
        EpisodeSpec(
            setup=setup,
            task=index,
            number=number,
            name=task.name,
            variant=variant,
            stand=stand,
            horizon=task.horizon,
            robot=task.robot,
            place=place,
            port=task.port,
        )
        for index, task in enumerate(tasks(setup))
        for number, (variant, stand, place) in enumerate(
            (variant, stand, place) for variant in task.variants for stand in variant.stands for place in task.places
        )
    )


# ---- the numbers


def _line(first: float, last: float, n: int) -> list[float]:
    return [round(float(value), 9) for value in np.linspace(first, last, n)]


ARM_COLOURS: Final = (
    "",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
"""The robot's URDFs that visual matching averages over; the first is the plain one."""
COKE_PLACES: Final = tuple(product(_line(-0.35, -0.12, 5), _line(-0.02, 0.42, 5)))
APPLE_PLACES: Final = tuple(product(_line(-0.08, -0.02, 3), _line(-0.02, 0.08, 3)))
CANS: Final = {"horizontal": "lr_switch", "vertical": "laid_vertically", "standing": "upright"}
DRAWERS: Final = tuple(product(("Open", "Close"), ("Top", "Middle", "Bottom")))
BY_THE_TABLE: Final = "google_pick_coke_can_1_v4"
COKE: Final = "GraspSingleOpenedCokeCanInScene-v0"
COKE_CLUTTER: Final = "GraspSingleOpenedCokeCanDistractorInScene-v0"
NEAR: Final = "MoveNearGoogleInScene-v0"
APPLE: Final = "PlaceIntoClosedTopDrawerCustomInScene-v0"
STANDS: Final = {
    place: Stand(x, y, yaw, f"open_drawer_{place}.png")
    for place, x, y, yaw in (
        ("a0", 0.644, -0.179, -0.03),
        ("a1", 0.765, -0.182, -0.02),
        ("a2", 0.889, -0.203, -0.06),
        ("b0", 0.652, 0.009, 0.0),
        ("b1", 0.752, 0.009, 0.0),
        ("b2", 0.851, 0.035, 0.0),
        ("c0", 0.665, 0.224, 0.0),
        ("c1", 0.765, 0.222, -0.025),
        ("c2", 0.865, 0.222, -0.025),
    )
}
"""Places of the robot before the drawers in visual matching."""


@functools.cache
def tasks(setup: Setup) -> tuple[TaskSpec, ...]:
    """All tasks of a setup.

    Raises:
        InputError: If there is no such setup.
    """
    if setup not in SETUPS:
        raise InputError(f"unknown setup {setup!r}: choose one of {', '.join(SETUPS)}")
    if setup == "widowx":
        return _widowx()
    looks = _matched if setup == "vm" else _varied
    return (
        *(
            TaskSpec(f"coke can {lie}", GOOGLE, 80, looks("coke", COKE, **{option: True}), COKE_PLACES)
            for lie, option in CANS.items()
        ),
        TaskSpec("move near", GOOGLE, 80, looks("near", NEAR), tuple(range(60))),
        *(
            TaskSpec(
                f"{verb} {which} drawer".lower(),
                GOOGLE,
                113,
                looks("drawer", f"{verb}{which}DrawerCustomInScene-v0"),
                ((0.0, 0.0),),
            )
            for verb, which in DRAWERS
        ),
        TaskSpec("apple in drawer", GOOGLE, 200, looks("apple", APPLE), APPLE_PLACES),
    )


def _matched(kind: str, env_id: str, **options: Option) -> tuple[Variant, ...]:
    """Visual matching: one scene, the robot in four colours."""
    scene = BY_THE_TABLE
    if kind == "coke":
        stands: tuple[Stand, ...] = (Stand(0.35, 0.20, photo="google_coke_can_real_eval_1.png"),)
    elif kind == "near":
        env_id = "MoveNearGoogleBakedTexInScene-v0"
        stands = (Stand(0.35, 0.21, -0.09, "google_move_near_real_eval_1.png"),)
    else:
        scene = "dummy_drawer"
        stands = tuple(stand for place, stand in STANDS.items() if kind == "drawer" or place[1] == "0")
        options |= {"shader_dir": "rt", "station_name": "mk_station_recolor", "light_mode": "simple"}
        options |= {"disable_bad_material": True} | ({"model_ids": "baked_apple_v2"} if kind == "apple" else {})
    return tuple(
        Variant(f"arm: {colour or 'plain'}", env_id, scene, {**options, "urdf_version": colour}, stands)
        for colour in ARM_COLOURS
    )


def _varied(kind: str, env_id: str, **options: Option) -> tuple[Variant, ...]:
    """Variant aggregation: the base scene, and what differs from it in each of the others."""
    base = BY_THE_TABLE if kind in ("coke", "near") else "frl_apartment_stage_simple"
    changes: list[tuple[str, str, str, dict[str, Option]]] = [("base", env_id, base, {})]
    if kind in ("coke", "near"):
        stands: tuple[Stand, ...] = (Stand(0.35, 0.20) if kind == "coke" else Stand(0.35, 0.21, -0.09),)
        if kind == "coke":
            changes += [("distractors", COKE_CLUTTER, base, {})]
            changes += [("distractors: more", COKE_CLUTTER, base, {"distractor_config": "more"})]
        else:
            changes += [("no distractor", env_id, base, {"no_distractor": True})]
        walls = {"1": f"{base}_alt_background", "2": f"{base}_alt_background_2"}
        changes += [(f"background: {n}", env_id, scene, {}) for n, scene in walls.items()]
        changes += [(f"lighting: {n}", env_id, base, {f"slightly_{n}_lighting": True}) for n in ("darker", "brighter")]
        changes += [(f"table: {n}", env_id, f"Baked_sc1_staging_objaverse_cabinet{n}_h870", {}) for n in (1, 2)]
    else:
        stands = tuple(Stand(x, y) for x in _line(0.65, 0.85, 3) for y in _line(-0.2, 0.2, 3))
        options["shader_dir"] = "rt"
        if kind == "apple":
            stands = stands[:3]  # the nearest x
            options["model_ids"] = "apple"
        changes += [(f"background: {n}", env_id, f"modern_{n}_no_roof", {}) for n in ("bedroom", "office")]
        changes += [(f"lighting: {n}", env_id, base, {"light_mode": n}) for n in ("brighter", "darker")]
        changes += [(f"cabinet: {n}", env_id, base, {"station_name": f"mk_station{n}"}) for n in (2, 3)]
    return tuple(Variant(name, env, scene, {**options, **more}, stands) for name, env, scene, more in changes)


def _widowx() -> tuple[TaskSpec, ...]:
    table, on_table = Stand(0.147, 0.028, photo="bridge_real_eval_1.png"), ("bridge_table_1_v1", "widowx")
    sink, in_sink = Stand(0.127, 0.060, photo="bridge_sink.png"), ("bridge_table_1_v2", "widowx_sink_camera_setup")
    rows = (
        ("put spoon on towel", "PutSpoonOnTableClothInScene", 60, table, on_table),
        ("put carrot on plate", "PutCarrotOnPlateInScene", 60, table, on_table),
        ("stack green block on yellow block", "StackGreenCubeOnYellowCubeBakedTexInScene", 60, table, on_table),
        ("put eggplant in basket", "PutEggplantInBasketScene", 120, sink, in_sink),
    )
    variants = [Variant("base", f"{env}-v0", scene, {}, (stand,), body) for _, env, _, stand, (scene, body) in rows]
    return tuple(
        TaskSpec(name, WIDOWX, horizon, (variant,), tuple(range(24)), port=f"{env}-v1")
        for (name, env, horizon, _, _), variant in zip(rows, variants, strict=True)
    )
