"""SIMPLER as data: the published counts, kwargs against the upstream scripts, tables by hand, actions by hand."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lac_vla.errors import InputError
from lac_vla.results.records import EpisodeRecord
from lac_vla.sims.simpler import assets
from lac_vla.sims.simpler.actions import GoogleActions, WidowXActions, axis_angle, conversion, euler_xyz
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.episode import GOOGLE, SETUPS, WIDOWX, EpisodeSpec, Setup
from lac_vla.sims.simpler.ms2 import Ms2Backend, reset_options
from lac_vla.sims.simpler.protocol import episodes, tasks
from lac_vla.sims.simpler.published_table import PublishedTable, cells

# ---- the sweep


def counts(setup: Setup) -> dict[str, int]:
    return dict(Counter(episode.name for episode in episodes(setup)))


def test_the_published_counts() -> None:
    drawers = [f"{do} {which} drawer" for do in ("open", "close") for which in ("top", "middle", "bottom")]
    cans = [f"coke can {lie}" for lie in ("horizontal", "vertical", "standing")]
    vm, va = counts("vm"), counts("va")
    assert [sum(counts(setup).values()) for setup in SETUPS] == [864, 1722, 96]
    assert [vm[can] for can in cans] == [100] * 3
    assert [va[can] for can in cans] == [225] * 3
    assert (vm["move near"], va["move near"]) == (240, 480)
    assert [vm[drawer] for drawer in drawers] == [36] * 6
    assert [va[drawer] for drawer in drawers] == [63] * 6
    assert (vm["apple in drawer"], va["apple in drawer"]) == (108, 189)
    assert list(counts("widowx").values()) == [24] * 4


def test_horizons_and_ray_tracing() -> None:
    for setup in ("vm", "va"):
        horizons = {task.name: task.horizon for task in tasks(setup)}
        assert {horizons[name] for name in horizons if name.startswith(("coke", "move"))} == {80}
        assert {horizons[name] for name in horizons if name.endswith("drawer") and "apple" not in name} == {113}
        assert horizons["apple in drawer"] == 200
        traced = {episode.name for episode in episodes(setup) if episode.ray_traced}
        assert traced == {name for name in horizons if "drawer" in name}
    assert [task.horizon for task in tasks("widowx")] == [60, 60, 60, 120]


@pytest.mark.parametrize("setup", SETUPS)
def test_no_episode_is_there_twice(setup: Setup) -> None:
    seen = {dataclasses.astuple(dataclasses.replace(e, number=0)).__repr__() for e in episodes(setup)}
    assert len(seen) == len(episodes(setup))
    for k in range(len(tasks(setup))):
        numbers = [episode.number for episode in episodes(setup) if episode.task == k]
        assert numbers == list(range(len(numbers)))


def find(setup: Setup, name: str, variant: str, number: int = 0) -> EpisodeSpec:
    found = [e for e in episodes(setup) if e.name == name and e.variant.name == variant]
    return found[number]


def told(episode: EpisodeSpec, **options: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What the original's gymnasium is told: id, keyword arguments without those of every episode, reset options."""
    kwargs = Ms2Backend((), Path("data"), **options).kwargs(episode)
    common = {"obs_mode": "rgbd", "camera_cfgs": {"add_segmentation": True}}
    assert {key: kwargs.pop(key) for key in common} == common
    assert kwargs.pop("control_mode") == episode.robot.control_mode
    return episode.variant.env_id, kwargs, reset_options(episode)


def test_one_episode_of_each_kind_is_told_as_upstream_tells_it() -> None:
    google = {"robot": "google_robot_static", "sim_freq": 513, "control_freq": 3}
    assert told(find("vm", "coke can standing", "arm: recolor_cabinet_visual_matching_1", 6)) == (
        "GraspSingleOpenedCokeCanInScene-v0",
        google
        | {
            "max_episode_steps": 80,
            "scene_name": "google_pick_coke_can_1_v4",
            "rgb_overlay_path": "data/real_inpainting/google_coke_can_real_eval_1.png",
            "rgb_overlay_cameras": ["overhead_camera"],
            "upright": True,
            "urdf_version": "recolor_cabinet_visual_matching_1",
        },
        {
            "robot_init_options": {"init_xy": [0.35, 0.2], "init_rot_quat": [-0.0, 0.0, 0.0, 1.0]},
            "obj_init_options": {"init_xy": [-0.2925, 0.09]},  # second x of five from -.35 to -.12, second y of five
        },
    )
    env_id, kwargs, options = told(find("va", "move near", "no distractor", 59))
    assert env_id == "MoveNearGoogleInScene-v0"
    assert kwargs == google | {
        "max_episode_steps": 80,
        "scene_name": "google_pick_coke_can_1_v4",
        "rgb_overlay_path": None,
        "no_distractor": True,
    }
    assert options["obj_init_options"] == {"episode_id": 59}
    # Half a turn about z and -0.09 rad: w = cos((π - 0.09)/2), z = sin((π - 0.09)/2), up to a common sign.
    expected = [math.cos((math.pi - 0.09) / 2), 0, 0, math.sin((math.pi - 0.09) / 2)]
    np.testing.assert_allclose(options["robot_init_options"]["init_rot_quat"], expected, atol=1e-12)
    assert told(find("vm", "close middle drawer", "arm: plain", 2)) == (
        "CloseMiddleDrawerCustomInScene-v0",
        google
        | {
            "max_episode_steps": 113,
            "scene_name": "dummy_drawer",
            "rgb_overlay_path": "data/real_inpainting/open_drawer_a2.png",
            "rgb_overlay_cameras": ["overhead_camera"],
            "shader_dir": "rt",
            "station_name": "mk_station_recolor",
            "light_mode": "simple",
            "disable_bad_material": True,
            "urdf_version": "",
        },
        {
            "robot_init_options": {
                "init_xy": [0.889, -0.203],
                "init_rot_quat": [math.sin(0.03), 0.0, 0.0, math.cos(0.03)],
            },
            "obj_init_options": {"init_xy": [0.0, 0.0]},
        },
    )
    env_id, kwargs, options = told(find("va", "apple in drawer", "cabinet: 3", 26), ray_tracing=False)
    assert env_id == "PlaceIntoClosedTopDrawerCustomInScene-v0"
    assert kwargs["model_ids"] == "apple"
    assert (kwargs["station_name"], kwargs["scene_name"]) == ("mk_station3", "frl_apartment_stage_simple")
    assert "shader_dir" not in kwargs
    assert options["robot_init_options"]["init_xy"] == [0.65, 0.2]
    assert options["obj_init_options"] == {"init_xy": [-0.02, 0.08]}
    env_id, kwargs, options = told(find("widowx", "put eggplant in basket", "base", 5))
    assert env_id == "PutEggplantInBasketScene-v0"
    assert kwargs == {
        "robot": "widowx_sink_camera_setup",
        "sim_freq": 500,
        "control_freq": 5,
        "max_episode_steps": 120,
        "scene_name": "bridge_table_1_v2",
        "rgb_overlay_path": "data/real_inpainting/bridge_sink.png",
        "rgb_overlay_cameras": ["3rd_view_camera"],
    }
    assert options["robot_init_options"]["init_xy"] == [0.127, 0.06]
    assert options["obj_init_options"] == {"episode_id": 5}


def test_the_variants_that_upstream_aggregates() -> None:
    names = {task.name: [variant.name for variant in task.variants] for task in tasks("va")}
    assert names["coke can standing"] == [
        *("base", "distractors", "distractors: more", "background: 1", "background: 2"),
        *("lighting: darker", "lighting: brighter", "table: 1", "table: 2"),
    ]
    assert len(names["move near"]) == 8
    assert names["open top drawer"] == names["apple in drawer"]
    assert len(names["open top drawer"]) == 7
    assert not any("camera" in name for row in names.values() for name in row)


# ---- actions


def test_rotations_by_hand() -> None:
    np.testing.assert_allclose(axis_angle(0.3, 0, 0), [0.3, 0, 0], atol=1e-12)
    np.testing.assert_allclose(axis_angle(0, 0, -0.2), [0, 0, -0.2], atol=1e-12)
    # x by 90°, then the fixed z by 90°: a third of a turn about (1, 1, 1).
    np.testing.assert_allclose(axis_angle(np.pi / 2, 0, np.pi / 2), np.full(3, 2 * np.pi / 3 / np.sqrt(3)), atol=1e-12)
    assert not axis_angle(0, 0, 0).any()
    np.testing.assert_allclose(euler_xyz(np.array([0, 0.4, 0])), [0, 0.4, 0], atol=1e-12)
    # The same third of a turn about moving axes: Rx(a) Ry(b) Rz(c) with columns y, z, x is a = 90°, b = 90°, c = 0.
    np.testing.assert_allclose(euler_xyz(np.full(3, 2 * np.pi / 3 / np.sqrt(3)))[1], np.pi / 2, atol=1e-6)
    assert not euler_xyz(np.zeros(3)).any()


@pytest.mark.parametrize("seed", range(5))
def test_both_notations_mean_the_same_rotation(seed: int) -> None:
    def about(axis: int, angle: float) -> Any:
        c, s = np.cos(angle), np.sin(angle)
        r, (i, j) = np.eye(3), [(1, 2), (2, 0), (0, 1)][axis]
        r[i, i], r[i, j], r[j, i], r[j, j] = c, -s, s, c
        return r

    roll, pitch, yaw = np.random.default_rng(seed).uniform(-1, 1, 3)
    fixed = about(2, yaw) @ about(1, pitch) @ about(0, roll)
    a, b, c = euler_xyz(axis_angle(roll, pitch, yaw))
    np.testing.assert_allclose(about(0, a) @ about(1, b) @ about(2, c), fixed, atol=1e-12)


def grips(convert: Any, openings: list[float]) -> list[float]:
    return [round(float(convert([0, 0, 0, 0, 0, 0, opening])[6]), 6) for opening in openings]


def test_the_widowx_opens_or_closes() -> None:
    convert = WidowXActions()
    np.testing.assert_allclose(convert([0.01, -0.02, 0.03, 0.1, 0, 0, 0.51]), [0.01, -0.02, 0.03, 0.1, 0, 0, 1])
    assert grips(convert, [0.0, 0.5, 0.6, 1.0]) == [-1, -1, 1, 1]


def test_cogacts_sticky_gripper_by_hand() -> None:
    convert = GoogleActions(repeat=3)
    # 1 → 0 is a command to close (+1) for three steps; the next change is measured from the 0 of the command.
    assert grips(convert, [1, 1, 0, 0, 1, 1, 1, 1, 1]) == [0, 0, 1, 1, 1, -1, -1, -1, 0]
    convert.reset()
    # 0.4 from step to step is no command of itself; from the last command it adds up.
    assert grips(convert, [1, 0.6, 0.2, 0.2]) == [0, 0.4, 0.8, 0.8]


def test_openvlas_sticky_gripper_by_hand() -> None:
    convert = GoogleActions(repeat=3, since_command=False)
    assert grips(convert, [1, 0, 1, 1, 1, 0.6, 0.2]) == [0, 1, 1, 1, 0, 0.4, 0.4]


def test_conversions_by_robot_and_family() -> None:
    assert isinstance(conversion(WIDOWX, "cogact"), WidowXActions)
    assert conversion(GOOGLE, "cogact") == GoogleActions(10, True)
    assert conversion(GOOGLE, "openvla") == GoogleActions(15, False)
    with pytest.raises(InputError, match="cogact, openvla"):
        conversion(GOOGLE, "octo")  # type: ignore[arg-type]


@pytest.mark.parametrize("action", [np.zeros(6), [0, 0, 0, 0, 0, 0, np.nan], "up", np.zeros((1, 7))])
def test_malformed_actions(action: Any) -> None:
    convert = GoogleActions()
    with pytest.raises(InputError, match="action"):
        convert(action)
    assert grips(convert, [1, 0]) == [0, 1]  # nothing was remembered


# ---- tables


def outcome(
    episode: EpisodeSpec, success: bool, method: str = "dense", stress: str = "", **other: Any
) -> EpisodeRecord:
    facts = {"success_any": success, "grasped": success, "ray_traced": episode.ray_traced, "backend": "ms2"}
    facts["stand_ins"] = []
    return EpisodeRecord(
        method=method,
        suite=f"simpler-{episode.setup}",
        task=episode.task,
        instruction=episode.name,
        init_state=episode.number,
        seed=0,
        success=success,
        steps=episode.horizon,
        horizon=episode.horizon,
        stress=stress,
        outcome=facts | other,
    )


def test_a_run_of_before_stand_ins_were_told_is_not_called_simpler() -> None:
    records = sweep("widowx", lambda e: True)
    del records[0].outcome["stand_ins"]
    table = PublishedTable.of("widowx", records)
    assert any("older run" in reason for reason in table.reasons)
    assert "not comparable" in table.title


def sweep(setup: Setup, rule: Any, **other: Any) -> list[EpisodeRecord]:
    return [outcome(episode, bool(rule(episode)), **other) for episode in episodes(setup)]


def values(setup: Setup, outcomes: list[EpisodeRecord], **how: Any) -> dict[str, float | None]:
    return {cell.name: cell.value for cell in cells(setup, outcomes, **how)}


def test_googles_table_by_hand() -> None:
    def rule(episode: EpisodeSpec) -> bool:
        return (
            episode.name == "coke can horizontal"
            or (episode.name == "coke can vertical" and episode.variant.name == "arm: plain")
            or (episode.name == "move near" and isinstance(episode.place, int) and episode.place < 15)
            or episode.name in ("close top drawer", "close bottom drawer", "open top drawer")
            or (episode.name == "apple in drawer" and episode.stand.photo == "open_drawer_b0.png")
        )

    row = values("vm", sweep("vm", rule))
    assert list(row) == [
        *("coke can horizontal", "coke can vertical", "coke can standing", "coke can average", "move near"),
        *("drawer open", "drawer close", "drawer average", "apple in drawer", "average"),
    ]
    coke, near, drawer, apple = (1 + 0.25 + 0) / 3, 15 / 60, (1 / 3 + 2 / 3) / 2, 1 / 3
    expected = [1, 0.25, 0, coke, near, 1 / 3, 2 / 3, drawer, apple, (coke + near + drawer + apple) / 4]
    assert list(row.values()) == pytest.approx(expected)
    assert [(cell.played, cell.of) for cell in cells("vm", sweep("vm", rule))] == [
        *((100, 100),) * 3,
        (300, 300),
        (240, 240),
        *((108, 108),) * 2,
        (216, 216),
        (108, 108),
        (864, 864),
    ]


def test_a_cell_is_a_mean_over_variants() -> None:
    near = [episode for episode in episodes("va") if episode.name == "move near"]
    base = [outcome(e, True) for e in near if e.variant.name == "base"]
    dark = [outcome(e, False) for e in near if e.variant.name == "lighting: darker"][:6]
    row = values("va", base + dark)
    assert row["move near"] == pytest.approx(0.5)  # not 60 of 66
    assert row["apple in drawer"] is None
    assert row["average"] is None


def test_widowxs_table_by_hand() -> None:
    grasped = [
        outcome(e, e.number < 6 * (e.task + 1), grasped=True, success_any=e.number < 12) for e in episodes("widowx")
    ]
    row = values("widowx", grasped)
    assert list(row)[:2] == ["grasp: put spoon on towel", "success: put spoon on towel"]
    assert [row[f"success: {task.name}"] for task in tasks("widowx")] == [0.25, 0.5, 0.75, 1.0]
    assert {row[f"grasp: {task.name}"] for task in tasks("widowx")} == {1.0}
    assert row["success: average"] == 0.625
    assert values("widowx", grasped, any_step=True)["success: average"] == 0.5


def test_a_whole_traced_sweep_of_the_original_bears_the_name() -> None:
    named = PublishedTable.of("vm", sweep("vm", lambda e: True) + sweep("vm", lambda e: False, method="lac"))
    assert named.title == "SIMPLER, Google robot, visual matching"
    assert not named.reasons


def test_the_name_is_refused_with_the_reason() -> None:
    whole, more = sweep("va", lambda e: True), sweep("va", lambda e: True, method="lac")
    short = PublishedTable.of("va", whole + more[3:])
    assert short.title == (
        "SIMPLER Google robot variant aggregation, original simulator; not comparable with published tables"
    )
    assert short.reasons == ("the sweep is not whole: lac lacks 3 of 1722: coke can horizontal 3",)
    (flat,) = PublishedTable.of("va", sweep("va", lambda e: True, ray_traced=False)).reasons
    assert flat.startswith("not ray-traced: dense in open top drawer")
    assert ", not ray-traced;" in PublishedTable.of("va", sweep("va", lambda e: True, ray_traced=False)).title
    assert "apple in drawer" in flat
    assert "coke" not in flat
    (port,) = PublishedTable.of("widowx", sweep("widowx", lambda e: True, backend="ms3")).reasons
    assert port == "not the original simulator: dense on ms3"
    (shaken,) = PublishedTable.of("widowx", sweep("widowx", lambda e: True, stress="shake")).reasons
    assert shaken == "under stress: dense under shake"
    boxes = PublishedTable.of("widowx", sweep("widowx", lambda e: True, backend="ms3", stand_ins=["b.glb", "a.glb"]))
    assert boxes.title == (
        "SIMPLER WidowX tasks, ManiSkill3 port, stand-ins: a.glb, b.glb; not comparable with published tables"
    )
    assert boxes.reasons[1] == "stand-ins for the benchmark's own files: dense with a.glb, b.glb"
    assert boxes.title in str(boxes.to_terminal().title)
    (skin,) = PublishedTable.of("vm", sweep("vm", lambda e: True, stand_ins=["can/textured.glb"])).reasons
    assert "can/textured.glb" in skin
    assert PublishedTable.of("vm", []).reasons == ("no episode was played",)


def test_foreign_episodes_are_no_part_of_a_table() -> None:
    one = outcome(episodes("vm")[0], True)
    with pytest.raises(InputError, match="twice"):
        cells("vm", [one, one])
    with pytest.raises(InputError, match="none of va's"):
        cells("va", [one])
    with pytest.raises(InputError, match="none of vm's"):
        cells("vm", [dataclasses.replace(one, init_state=100)])
    with pytest.raises(InputError, match="none of vm's"):
        PublishedTable.of("vm", [dataclasses.replace(one, suite="libero_spatial", outcome={})])


# ---- what is missing


DRIVER = "A Vulkan driver. install one"


def touch(files: dict[str, Path]) -> None:
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not the benchmark's")


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"])
    wanted = [e for e in episodes("vm") if e.name in ("coke can standing", "open top drawer")]
    nothing = assets.missing_for_original(wanted, None, None, ray_tracing=True)
    assert ["interpreter" in nothing[0], "assets" in nothing[1], len(nothing)] == [True, True, 2]
    python = tmp_path / "python"
    python.touch(mode=0o755)
    (one,) = assets.missing_for_original(wanted, tmp_path, str(python), ray_tracing=True)
    assert one.endswith("\n    … and 4 more")
    monkeypatch.setattr(assets, "SHOWN", 99)
    (one,) = assets.missing_for_original(wanted, tmp_path, str(python), ray_tracing=True)
    assert set(one.split("\n    ")[1:]) == {
        "hab2_bench_assets/stages/google_pick_coke_can_1_v4.glb",
        "real_inpainting/google_coke_can_real_eval_1.png",
        "custom/info_pick_custom_v0.json",
        "custom/mk_station_recolor.urdf",
        *(f"real_inpainting/open_drawer_{row}{n}.png" for row in "abc" for n in range(3)),
        *(f"custom/models/opened_coke_can/{n}" for n in ("Image_2.004.jpg", "collision.obj", "textured.dae")),
    }
    assert "github.com/simpler-env" in one
    for episode in wanted:
        touch(assets.original_files(episode, tmp_path))
    assert not assets.missing_for_original(wanted, tmp_path, str(python), ray_tracing=True)
    mesh = tmp_path / "custom/models/opened_coke_can/collision.obj"
    mesh.unlink()
    (one,) = assets.missing_for_original(wanted, tmp_path, str(python), ray_tracing=True)
    assert one.split("\n    ")[1:] == ["custom/models/opened_coke_can/collision.obj"]
    mesh.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        (one,) = assets.missing_for_original(wanted, tmp_path, str(python), ray_tracing=True)
        assert "right to write to" in one
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    monkeypatch.setattr(assets, "vulkan_missing", lambda: DRIVER)
    driver, gpu = assets.missing_for_original(wanted, tmp_path, str(python), ray_tracing=True)
    assert driver == DRIVER
    assert "NVIDIA" in gpu
    assert assets.missing_for_original(wanted, tmp_path, str(python), ray_tracing=False) == [DRIVER]
    assert assets.missing_for_original(wanted[:1], tmp_path, str(python), ray_tracing=True) == [DRIVER]


def test_stand_ins_are_told_from_the_benchmarks_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episode = find("widowx", "put eggplant in basket", "base")
    files = assets.original_files(episode, tmp_path)
    assert "custom/models/sink/collision.mtl" in files
    assert not assets.stand_ins(files), "what is not there stands for nothing"
    touch(files)
    (own,) = {assets._blob_id(path) for path in files.values()}
    assert own == "5a410e799b8e24c582bab7583e53b86e46f8cde3"
    monkeypatch.setattr(assets, "originals", lambda: dict.fromkeys(files, own[:12]))
    assert not assets.stand_ins(files)
    (tmp_path / "custom/models/eggplant/textured.dae").rename(tmp_path / "custom/models/eggplant/textured.glb")
    assert assets.stand_ins(assets.original_files(episode, tmp_path)) == ("eggplant/textured.glb",)


def test_every_file_of_every_episode_is_known() -> None:
    for setup in SETUPS:
        for episode in assets.distinct(episodes(setup)):
            assert set(assets.original_files(episode, Path("data"))) <= set(assets.originals())
    assert {len(digits) for digits in assets.originals().values()} == {12}


def test_a_stages_shape_is_not_trusted_once_the_stage_is_another(tmp_path: Path) -> None:
    stage, cache = tmp_path / "stage.glb", tmp_path / "stage.glb.nonconvex.stl"
    stage.touch()
    cache.touch()
    assets.drop_stale_caches([stage])
    assert cache.exists()
    os.utime(cache, (1, 1))
    assets.drop_stale_caches([stage])
    assert not cache.exists()


def test_the_port_has_no_google_robot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assets, "vulkan_missing", lambda: None)
    said = "\n".join(assets.missing_for_port(episodes("vm"), tmp_path))
    assert "move near" in said
    assert "lac-vla[simpler]" in said
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: object())
    bridge, robot = assets.missing_for_port(episodes("widowx"), tmp_path)
    assert "download_asset bridge_v2_real2sim" in bridge
    assert "download_asset widowx250s" in robot
    for episode in assets.distinct(episodes("widowx")):
        touch(assets.port_files(episode, tmp_path))
    assert not assets.missing_for_port(episodes("widowx"), tmp_path)
    (
        tmp_path / "data/robots/widowx/wx250s.srdf"
    ).unlink()  # as in the original's robot, whose gripper never closes here
    (robot,) = assets.missing_for_port(episodes("widowx"), tmp_path)
    assert robot.endswith("wx250s.srdf")
    assert "widowx/wx250s.urdf" in assets.stand_ins(assets.port_files(episodes("widowx")[0], tmp_path))


def test_a_driver_that_is_named_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "ICD_FOLDERS", (str(tmp_path / "none"),))
    for name in assets.ICD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert assets.vulkan_missing() is not None
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "lvp.json"))
    assert "make sim-simpler" in str(assets.vulkan_missing())
    (tmp_path / "lvp.json").touch()
    assert assets.vulkan_missing() is None


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="vm, va, widowx"):
        tasks("bridge")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"0\.\.3"):
        SimplerEnv("widowx", 4, None, WidowXActions())  # type: ignore[arg-type]
