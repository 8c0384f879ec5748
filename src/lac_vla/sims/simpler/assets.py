"""List what SIMPLER needs and this machine does not have, and where it comes from.

SIMPLER's photos, scenes and meshes are CC BY-NC: they are never redistributed here. A task counts as complete if the
files that distinguish it are there (scene, photo, list of objects, cabinet); single meshes are not looked for.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from lac_vla.sims.simpler.episode import EpisodeSpec

ORIGINAL: Final = "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv"
"""The original and its assets."""
PORT_ASSETS: Final = {
    "tasks/bridge_v2_real2sim_dataset": "python -m mani_skill.utils.download_asset bridge_v2_real2sim",
    "robots/widowx/wx250s.urdf": "python -m mani_skill.utils.download_asset widowx250s",
}
"""Path in ManiSkill3's data folder → command that fetches it."""
ICD_FOLDERS: Final = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
ICD_VARIABLES: Final = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
SHOWN: Final = 12
"""Missing files that a message names."""


def photo(assets: Path, name: str) -> Path:
    """A background photo in the original's data folder."""
    return assets / "real_inpainting" / name


def original_files(episode: EpisodeSpec, assets: Path) -> tuple[Path, ...]:
    """Files of the original's data folder that distinguish an episode."""
    variant, custom, files = episode.variant, assets / "custom", []
    if not variant.scene.startswith("dummy"):
        files.append(assets / "hab2_bench_assets" / "stages" / f"{variant.scene}.glb")
    if episode.stand.photo is not None:
        files.append(photo(assets, episode.stand.photo))
    if "Drawer" in variant.env_id:
        files.append(custom / f"{variant.options.get('station_name', 'mk_station')}.urdf")
    objects = "bridge_custom" if episode.robot.name == "widowx" else "pick_custom"
    baked = "_baked_tex" if "BakedTex" in variant.env_id or variant.env_id.startswith("PlaceInto") else ""
    version = "v1" if variant.env_id.startswith("PlaceInto") else "v0"
    return (*files, custom / f"info_{objects}{baked}_{version}.json")


def missing_for_original(
    wanted: Iterable[EpisodeSpec], assets: Path | None, python: str | None, *, ray_tracing: bool
) -> list[str]:
    """List what the original needs for some episodes and does not find. Its interpreter is not started."""
    wanted, lacking = list(wanted), []
    if python is None or not os.access(python, os.X_OK):
        found = "" if python is None else f" ({python} cannot be run)"
        need = "SimplerEnv's own interpreter: Python 3.10 or 3.11, numpy < 2, gymnasium < 1, sapien 2.2.2" + found
        lacking.append(f"{need}. {ORIGINAL}; install it as its README says; then --python INTERPRETER")
    if assets is None or not assets.is_dir():
        need = "SimplerEnv's assets (CC BY-NC)" + ("" if assets is None else f" ({assets} is no folder)")
        lacking.append(f"{need}. {ORIGINAL}; then --assets SimplerEnv/ManiSkill2_real2sim/data")
    else:
        paths = sorted({path for episode in wanted for path in original_files(episode, assets)})
        if files := [str(path.relative_to(assets)) for path in paths if not path.exists()]:
            need = (
                f"{len(files)} of {len(paths)} files in {assets} (CC BY-NC). They come with the repository: {ORIGINAL}"
            )
            more = [f"… and {len(files) - SHOWN} more"] if len(files) > SHOWN else []
            lacking.append("\n    ".join([need, *files[:SHOWN], *more]))
    if ray_tracing and any(episode.ray_traced for episode in wanted) and not glob.glob("/dev/nvidia[0-9]*"):
        need = "An NVIDIA GPU: the drawer and apple tasks are ray-traced"
        lacking.append(f"{need}. With --no-ray-tracing they run without, and are not called SIMPLER's")
    return lacking


def missing_for_port(wanted: Iterable[EpisodeSpec]) -> list[str]:
    """List what the port to ManiSkill3 needs for some episodes and does not find."""
    lacking = []
    if absent := sorted({episode.name for episode in wanted if episode.port is None}):
        lacking.append(
            f"The port has no Google robot: not there are {', '.join(absent)}. Use the original: --backend ms2"
        )
    if importlib.util.find_spec("mani_skill") is None:
        lacking.append('ManiSkill3. pip install "lac-vla[simpler]"')
    if (vulkan := vulkan_missing()) is not None:
        lacking.append(vulkan)
    data = Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill") / "data"
    fetch = [f"{data / path} (CC BY-NC). {get}" for path, get in PORT_ASSETS.items() if not (data / path).exists()]
    return lacking + fetch


def vulkan_missing() -> str | None:
    """Name a Vulkan driver, if there is none: SAPIEN does not even simulate without one."""
    named = [path for name in ICD_VARIABLES for path in os.environ.get(name, "").split(os.pathsep) if path]
    if any(map(os.path.exists, named)) or any(glob.glob(f"{folder}/*.json") for folder in ICD_FOLDERS):
        return None
    need = "A Vulkan driver: an NVIDIA GPU's, or Mesa's for CPUs, version 25 or later"
    return f"{need}. `make sim-simpler` unpacks Mesa beside the environment; `. .vulkan/env.sh` makes it known"
