"""The rules themselves, on inputs small enough to compute by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lac_vla import InputError, Motion, PolicyInput, Random, TokenLayout
from lac_vla.policies import Dense, Periodic, PolicySpec, build_policy, cache_lowest, paths_by_name

LAYOUT = TokenLayout.of({"a": (2, 2)}, 1, 1)
GREY = np.full((8, 8, 3), 100, np.uint8)


def policy_input(
    pixels: np.ndarray, reference: np.ndarray, flow: np.ndarray | None = None, seed: int = 0
) -> PolicyInput:
    return PolicyInput(
        layout=LAYOUT,
        n_layers=3,
        instruction="go",
        pixels={"a": pixels},
        previous={"a": GREY},
        reference={"a": reference},
        flow={} if flow is None else {"a": flow},
        age=np.zeros(4, np.int64),
        rng=np.random.default_rng(seed),
    )


def changed(**patches: int) -> np.ndarray:
    """A grey picture whose patches p0..p3 (raster order) are brighter by a value."""
    image = GREY.copy()
    for name, value in patches.items():
        row, col = divmod(int(name[1]), 2)
        image[4 * row : 4 * row + 4, 4 * col : 4 * col + 4] += value
    return image


def test_motion_reuses_what_changed_least_since_its_slot_was_computed() -> None:
    decision = Motion(0.5).decide(policy_input(changed(p0=30, p1=5, p2=90, p3=10), GREY))
    assert decision.exit_layer.tolist() == [3, 0, 3, 0]


def test_motion_compares_with_the_slots_own_pixels_not_with_the_previous_frame() -> None:
    """A slow drift: nothing changed since the last frame, everything since the slot of token 2 was computed."""
    now = changed(p2=40)
    decision = Motion(0.75).decide(policy_input(now, GREY))
    assert decision.exit_layer.tolist() == [0, 0, 3, 0]


def test_motion_counts_flow() -> None:
    flow = np.zeros((8, 8, 2), np.float32)
    flow[:4, 4:] = (3, 4)  # patch 1 moves by 5 pixels
    assert Motion(0.75).decide(policy_input(GREY, GREY, flow)).exit_layer.tolist() == [0, 3, 0, 0]


def test_ties_go_to_the_lower_index_and_half_counts_up() -> None:
    assert cache_lowest(np.zeros(5), 0.5).tolist() == [True, True, True, False, False]
    assert cache_lowest(np.zeros(256), 0.5).tolist() == [True] * 128 + [False] * 128  # of few values any sort is stable
    assert cache_lowest(np.array([2.0, 1.0, 1.0]), 1 / 3).tolist() == [False, True, False]
    assert cache_lowest(np.zeros(3), 0).sum() == 0
    assert cache_lowest(np.zeros(3), 1).sum() == 3


def test_random_draws_from_the_inputs_generator() -> None:
    picks = [Random(0.5).decide(policy_input(GREY, GREY, seed=seed)).exit_layer.tolist() for seed in (1, 1, 2, 3, 4)]
    assert picks[0] == picks[1]
    assert len({tuple(pick) for pick in picks}) > 1
    assert all(sorted(pick) == [0, 0, 3, 3] for pick in picks)


def test_periodic_sees_everything_or_nothing() -> None:
    """Age 0: the frame before was computed. After a dense frame that nobody planned, the period begins anew."""
    for every, computed in ((1, [True] * 4), (2, [False, True, True, True]), (3, [False, False, True, True])):
        for age, dense in enumerate(computed):
            inputs = replace(policy_input(GREY, GREY), age=np.full(4, age))
            decision = Periodic(every).decide(inputs)
            assert decision.exit_layer.tolist() == [3 * dense] * 4
            assert decision.nominal_ratio == 1 - dense
    mixed = replace(policy_input(GREY, GREY), age=np.array([0, 1, 0, 0]))
    assert Periodic(2).decide(mixed).active.all()
    for every in (0, 1.5, "2"):
        with pytest.raises(InputError, match="at least 1"):
            Periodic(every)  # type: ignore[arg-type]


def test_parse() -> None:
    assert build_policy(PolicySpec.parse("motion:ratio=0.7")) == Motion(0.7)
    assert build_policy(PolicySpec.parse("dense")) == Dense()


def test_a_spec_is_taken_apart() -> None:
    spec = PolicySpec.parse("short@lac:path=outputs/my.lac,recovery=0")
    assert (spec.name, spec.label) == ("lac", "short")
    assert spec.options == {"path": "outputs/my.lac", "recovery": "0"}


def test_a_label_ends_before_the_options() -> None:
    spec = PolicySpec.parse("lac:path=runs@home/lac")
    assert (spec.name, spec.label, spec.options) == ("lac", "", {"path": "runs@home/lac"})


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("dense", "dense"),
        ("motion:ratio=0.5", "motion-0.5"),
        ("lac:path=outputs/lac/full/,recovery=0", "lac-full-0"),
        ("lac:path=/somewhere/full", "lac-full"),
        ("no-recovery@lac:path=full,recovery=0", "no-recovery"),
    ],
)
def test_method_names(spec: str, name: str) -> None:
    assert PolicySpec.parse(spec).method == name


def test_results_hold_paths_by_name_alone() -> None:
    assert paths_by_name("a@lac:path=/some/where/full/,recovery=0") == "a@lac:path=full,recovery=0"
    assert paths_by_name("raft_small:C\\weights.pt") == "raft_small:weights.pt"
    assert paths_by_name("motion:ratio=0.5") == "motion:ratio=0.5"


def test_flow_is_the_policys_own() -> None:
    assert (Dense().flow, Random().flow, Motion().flow) == ("none", "none", "dis")


@pytest.mark.parametrize(
    "spec",
    [
        "nothing",
        "motion:ratio",
        "motion:ratio=",
        "motion:=1",
        "motion:ratio=x",
        "motion:ratio=0.5,ratio=0.6",
        "motion:speed=1",
        "motion:ratio=1.5",
        "@dense",
        "a/b@dense",
    ],
)
def test_parse_refuses(spec: str) -> None:
    with pytest.raises(InputError):
        build_policy(PolicySpec.parse(spec))


def test_motion_keeps_a_camera_while_the_ratio_leaves_room() -> None:
    layout = TokenLayout.of({"agentview": (2, 2), "wrist": (1, 2)}, 1, 3)
    still = {"agentview": np.full((4, 4, 3), 9, np.uint8), "wrist": np.full((2, 4, 3), 9, np.uint8)}
    changed = {name: image.copy() for name, image in still.items()}
    changed["agentview"][:2, :2], changed["agentview"][:2, 2:], changed["agentview"][2:, :2] = 200, 50, 100
    inputs = PolicyInput(layout, 2, "go", changed, still, still, {}, np.zeros(6, np.int64), np.random.default_rng(0))
    assert Motion(ratio=0.5, keep="wrist").decide(inputs).active.tolist() == [True, False, False, False, True, True]
    assert Motion(ratio=0.5).decide(inputs).active.tolist() == [True, True, True, False, False, False]
    assert Motion(ratio=1.0, keep="wrist").decide(inputs).active.sum() == 0
    changed["wrist"][:, :2] = 60
    assert Motion(ratio=0.84, keep="wrist").decide(inputs).active.tolist() == [False] * 4 + [True, False]
    with pytest.raises(InputError, match="keep the camera 'hand'"):
        Motion(keep="hand").decide(inputs)
