"""SIMPLER's WidowX tasks in the real ManiSkill3: episodes begin the same at any time, and the expert solves them.

Where ManiSkill3 and its assets are (``make sim-simpler``, ``MS_ASSET_DIR``); stand-ins will do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler import ms3
from lac_vla.sims.simpler.assets import missing_for_port, port_folder
from lac_vla.sims.simpler.benchmark import Simpler
from lac_vla.sims.simpler.ms3 import Ms3Backend
from lac_vla.sims.simpler.protocol import episodes

TASKS = range(4)
FIRST = [next(episode for episode in episodes("widowx") if episode.task == task) for task in TASKS]
TOUR = (0, 0, 1, 1, 2, 2, 3, 3, 0, 2, 0, 3, 1, 3, 2, 1, 0)
"""Tasks in an order in which every one follows every one."""
ALONE = """
import sys, numpy as np
from tests.sims.test_simpler_ms3 import begin
from lac_vla.sims.simpler.ms3 import Ms3Backend
np.savez(sys.argv[2], *begin(Ms3Backend(), int(sys.argv[1])))
"""


def test_without_a_driver_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ms3.assets, "vulkan_missing", lambda: "A Vulkan driver. install one")
    with pytest.raises(LacError, match=r"A Vulkan driver\. install one"):
        Ms3Backend()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setenv("MS_ASSET_DIR", "somewhere")
    monkeypatch.setattr(ms3.assets, "vulkan_missing", lambda: None)
    monkeypatch.setattr(ms3.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r'pip install "lac-vla\[simpler\]"'):
        Ms3Backend()


def test_every_task_follows_every_task() -> None:
    assert set(pairwise(TOUR)) == {(one, other) for one in TASKS for other in TASKS}


@pytest.fixture(scope="module")
def backend() -> Iterator[Ms3Backend]:
    if importlib.util.find_spec("mani_skill") is None:
        pytest.skip("ManiSkill3 is not installed: make sim-simpler")
    if missing := missing_for_port(FIRST, port_folder(None)):
        pytest.skip(missing[0])
    made = Ms3Backend()
    yield made
    made.close()


def begin(backend: Ms3Backend, task: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Begin an episode in which the robot goes down, and closes its fingers; its first picture, and all poses."""
    image, scenes = backend.reset(FIRST[task]).image, [backend.scene()]
    for _ in range(6):
        backend.step(np.array([0.0, 0.02, -0.03, 0.0, 0.0, 0.2, -1.0]))
        scenes.append(backend.scene())
    return image, np.stack([np.stack(dataclasses.astuple(scene)) for scene in scenes])


@pytest.mark.sim
@pytest.mark.slow
def test_an_episode_begins_the_same_whatever_was_played_before(backend: Ms3Backend, tmp_path: Path) -> None:
    alone = []
    for task in TASKS:
        subprocess.run([sys.executable, "-c", ALONE, str(task), f"{tmp_path}/{task}.npz"], check=True)
        with np.load(tmp_path / f"{task}.npz") as file:
            alone.append((file["arr_0"], file["arr_1"]))
    for before, task in zip((None, *TOUR), TOUR, strict=False):
        image, poses = begin(backend, task)
        np.testing.assert_array_equal(image, alone[task][0], err_msg=f"{task} after {before}")
        np.testing.assert_array_equal(poses, alone[task][1], err_msg=f"{task} after {before}")


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_solves_every_task(backend: Ms3Backend, task: int) -> None:
    said = Simpler("simpler-widowx", "ms3").prove(task)
    assert "gripper closes" in said
    assert "expert solves it" in said


@pytest.mark.sim
def test_failures_of_the_real_simulator(backend: Ms3Backend, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ms2"):
        backend.reset(episodes("vm")[0])
    with pytest.raises(SimulatorError, match="NoSuchTask-v9"):
        backend.reset(dataclasses.replace(FIRST[0], port="NoSuchTask-v9"))
    with pytest.raises(InputError, match="reset"):
        backend.step(np.zeros(7))
    with pytest.raises(InputError, match="start another"):
        Ms3Backend(folder=tmp_path)
    assert backend.metadata()["mani-skill"] == "3.0.1"
    first = backend.reset(FIRST[0])
    assert first.image.shape == (480, 640, 3)
    assert first.instruction == "put the spoon on the towel"
    assert not first.success
    assert len(backend.layouts(FIRST[0])) == 24
    fallen = [(x, y, 5.0) for x, y, _ in backend.layouts(FIRST[0])[0].positions]
    layout = dataclasses.replace(backend.layouts(FIRST[0])[0], positions=(fallen[0], (9.0, 9.0, 0.9)))
    with pytest.raises(SimulatorError, match="not on the table"):
        backend.reset(dataclasses.replace(FIRST[0], place=layout))
    backend.reset(FIRST[0])
