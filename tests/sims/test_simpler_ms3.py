"""ManiSkill3's API, on a task whose assets come with it: SIMPLER's own cannot be had everywhere."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest

from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler import ms3
from lac_vla.sims.simpler.assets import vulkan_missing
from lac_vla.sims.simpler.episode import EpisodeSpec
from lac_vla.sims.simpler.ms3 import Ms3Backend
from lac_vla.sims.simpler.protocol import episodes


def picking(number: int) -> EpisodeSpec:
    """An episode of PickCube-v1, in the words of the protocol."""
    first = episodes("widowx")[0]
    robot = dataclasses.replace(first.robot, camera="base_camera", control_mode="pd_ee_delta_pose")
    return dataclasses.replace(first, name="pick a cube", port="PickCube-v1", robot=robot, number=number, place=number)


def test_without_a_driver_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ms3, "vulkan_missing", lambda: "A Vulkan driver. install one")
    with pytest.raises(LacError, match=r"A Vulkan driver\. install one"):
        Ms3Backend()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(ms3, "vulkan_missing", lambda: None)
    monkeypatch.setattr(ms3.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r'pip install "lac-vla\[simpler\]"'):
        Ms3Backend()


@pytest.fixture(scope="module")
def backend() -> Iterator[Ms3Backend]:
    if importlib.util.find_spec("mani_skill") is None:
        pytest.skip("ManiSkill3 is not installed: make sim-simpler")
    if (missing := vulkan_missing()) is not None:
        pytest.skip(missing)
    made = Ms3Backend()
    yield made
    made.close()


@pytest.mark.sim
def test_an_episode_in_the_real_simulator(backend: Ms3Backend) -> None:
    first = backend.reset(picking(1))
    assert first.image.dtype == np.uint8
    assert first.image.shape == (128, 128, 3)
    assert first.image.std() > 5  # something is to be seen
    assert first.instruction == "pick a cube"  # this task has no words of its own
    assert not first.success
    still = np.array([0, 0, 0, 0, 0, 0, 1.0])
    down = np.array([0, 0, -1.0, 0, 0, 0, 1.0])
    moved = [backend.step(down) for _ in range(3)][-1].image
    again = backend.reset(picking(1)).image
    np.testing.assert_array_equal(again, first.image)  # an episode begins the same every time
    rested = [backend.step(still) for _ in range(3)][-1].image
    assert np.abs(moved.astype(int) - rested).mean() > 2 * np.abs(rested.astype(int) - first.image).mean()
    assert (backend.reset(picking(2)).image != first.image).any()
    assert backend.metadata()["mani-skill"] == "3.0.1"


@pytest.mark.sim
def test_failures_of_the_real_simulator(backend: Ms3Backend) -> None:
    google = episodes("vm")[0]
    with pytest.raises(InputError, match="ms2"):
        backend.reset(google)
    with pytest.raises(SimulatorError, match="NoSuchTask-v9"):
        backend.reset(dataclasses.replace(picking(0), port="NoSuchTask-v9"))
    with pytest.raises(InputError, match="reset"):
        backend.step(np.zeros(7))
    backend.reset(picking(0))
    backend.step(np.zeros(7))
