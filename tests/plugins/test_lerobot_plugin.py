"""LeRobot finds, makes, runs, saves and loads the policy: by a Python that has it, named by ``LAC_LEROBOT_PYTHON``."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.evaluation.worlds import save_tiny
from tests.models import pi0_checkpoint, smolvla_checkpoint

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "integrations" / "lerobot_policy_lac_vla"


@pytest.fixture(scope="module")
def lerobot_python() -> str:
    given = os.environ.get("LAC_LEROBOT_PYTHON")
    if given is None and importlib.util.find_spec("lerobot") is None:
        pytest.skip("no LeRobot here: name a Python that has it, and this library's dependencies: LAC_LEROBOT_PYTHON")
    return given or sys.executable


def installed(folder: Path) -> str:
    """What installing the distribution of ``integrations/`` leaves where Python looks."""
    project = (SHIM / "pyproject.toml").read_text(encoding="utf-8")
    name, version = (re.search(f'^{key} = "(.*)"$', project, re.MULTILINE)[1] for key in ("name", "version"))
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    return os.pathsep.join(map(str, (folder, SHIM, ROOT / "src")))


@pytest.mark.slow
def test_a_rollout_by_lerobot(lerobot_python: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "path").mkdir()
    run = subprocess.run(
        [lerobot_python, Path(__file__).with_name("lerobot_robot.py"), tmp_path / "model", tmp_path / "saved"],
        env={**os.environ, "PYTHONPATH": installed(tmp_path / "path")},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    print(f"\nLeRobot {told['version']}")
    assert told["before"] is False  # its discovery found the policy
    assert told["settings"]
    assert told["cameras"] == {"agentview": "observation.images.top", "wrist": "observation.images.hand"}
    assert len(told["complaints"]) == 3
    assert all("lac train" in complaint for complaint in told["complaints"])
    with np.load(tmp_path / "saved" / "actions.npz") as found:
        np.testing.assert_array_equal(found["actions"], np.float32(found["expected"]))
        np.testing.assert_array_equal(found["kept"], found["actions"][: len(found["kept"])])
        assert len(np.unique(found["actions"], axis=0)) > 2  # else the same actions say nothing


@pytest.mark.slow
def test_lerobots_own_policies_answer_alike(lerobot_python: str, tmp_path: Path) -> None:
    """SmolVLA, π0 and π0.5: its chunks, its queue, its engine for real-time chunking; since LeRobot 0.6."""
    folders = [smolvla_checkpoint.write(tmp_path / "smolvla")]
    folders += [pi0_checkpoint.write(tmp_path / family, family) for family in ("pi0", "pi05")]
    run = subprocess.run(
        [lerobot_python, Path(__file__).with_name("lerobot_policies.py"), *folders],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    print(f"\n{json.dumps(told)}")
    for folder in folders:
        found = told[folder.name]
        for name in ("dense", "bare"):
            assert max(found[name]) < 1e-4, (folder.name, name)
            assert found[f"{name}_fault"] is None
        assert found["reuse_fault"] is None
        assert found["reuse"][0] < 1e-4  # the first frame reuses nothing
        assert max(found["reuse"][1:]) > 1e-4
        assert found["reuse_ratio"] == pytest.approx(0.5, abs=0.02)
        assert len(found["queue"]) == found["steps"] + 2
        assert max(found["queue"]) < 1e-4
        assert found["supports_rtc"] is True
        rtc = found["rtc"]
        assert not rtc["failed"]
        assert rtc["finite"]
        assert rtc["actions"] > 0
        first, *then = rtc["asked"]
        assert first["left"] == 0
        assert len(then) == 2
        assert all(asked["left"] == 6 for asked in then)  # LeRobot's execution horizon
        frozen = [asked["frozen"] for asked in then if asked["frozen"] is not None]
        assert frozen  # else the machine was so slow that nothing was left to go on with
        assert max(frozen) < 1e-5
    assert "Cannot specify both --policy.path and --policy.type" in told["path_and_type"]


@pytest.mark.slow
def test_lerobots_own_policy_is_a_baseline(lerobot_python: str, tmp_path: Path) -> None:
    """It answers as the dense model does, and multiplies more: projections in every step, masked rows."""
    for model, options in (("mini-flow", []), ("pi05-tiny", ["--empty-cameras", "1"])):
        out = tmp_path / model
        run = subprocess.run(
            [lerobot_python, "-m", "lac_vla", "bench", "--lerobot", "--random-weights", model, *options,
             "--sections", "frame", "--threads", "1", "--warmup", "1", "--frames", "2",
             "--policies", "random:ratio=0.5", "--options", "vision_kv_reuse", "--out", out],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        result = json.loads((out / "bench.json").read_text(encoding="utf-8"))["frame"]
        assert result["stock"].startswith("LeRobot ")
        stock, dense = (next(row for row in result["rows"] if row["name"] == name) for name in ("dense stock", "dense"))
        assert dense["same_actions"] == 1
        assert stock["flops"] > dense["flops"]
        assert all(stock["windows_ms"][window]["p50"] > 0 for window in stock["windows_ms"])
