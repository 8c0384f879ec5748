"""List what SIMPLER needs and this machine does not have, where it comes from, and what is not the benchmark's own.

SIMPLER's photos, scenes and meshes are CC BY-NC: they are never redistributed here. ``originals.txt`` holds the first
digits of git's id of each of those that an episode needs (``git hash-object FILE``): commit ef7a4d4 of
``simpler-env/ManiSkill2_real2sim``, and v0.2.0 of ``haosulab/ManiSkill-WidowX250S``. A file with another id is a
stand-in, and is named wherever a result is.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from lac_vla.errors import InputError
from lac_vla.sims.simpler.episode import EpisodeSpec

ORIGINAL: Final = "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv"
"""The original and its assets."""
BRIDGE, WIDOWX = "data/tasks/bridge_v2_real2sim_dataset", "data/robots/widowx"
"""Folders of the port's assets."""
DOWNLOADS: Final = {BRIDGE: "bridge_v2_real2sim", WIDOWX: "widowx250s"}
"""Folder → name under which ManiSkill3's own tool fetches it."""
ICD_FOLDERS: Final = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
ICD_VARIABLES: Final = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
SHOWN: Final = 12
"""Missing files that a message names."""
SKINS: Final = ("textured.obj", "textured.dae", "textured.glb")
"""What an object may look like; the simulators take the first that is there."""
CACHE: Final = ".nonconvex.stl"
"""SAPIEN 2 writes a stage's shape to a file with this ending beside it, and reads that from then on."""
OBJECTS: Final = {
    "PutSpoonOnTableClothInScene-v0": ("bridge_spoon_generated_modified", "table_cloth_generated_shorter"),
    "PutCarrotOnPlateInScene-v0": ("bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v0": ("baked_green_cube_3cm", "baked_yellow_cube_3cm"),
    "PutEggplantInBasketScene-v0": ("eggplant", "sink", "dummy_sink_target_plane"),
    "GraspSingleOpenedCokeCanInScene-v0": ("opened_coke_can",),
    "GraspSingleOpenedCokeCanDistractorInScene-v0": (
        *("opened_coke_can", "opened_pepsi_can", "apple", "sponge", "orange"),
        *("opened_7up_can", "opened_sprite_can", "opened_fanta_can", "bridge_spoon_generated_modified"),
    ),
    "MoveNearGoogleInScene-v0": (
        *("blue_plastic_bottle", "opened_pepsi_can", "orange", "opened_7up_can"),
        *("apple", "sponge", "opened_coke_can", "opened_redbull_can"),
    ),
    "MoveNearGoogleBakedTexInScene-v0": (
        *("blue_plastic_bottle", "baked_opened_pepsi_can", "orange", "baked_opened_7up_can"),
        *("baked_apple", "baked_sponge", "baked_opened_coke_can", "baked_opened_redbull_can"),
    ),
}
"""The original's environment → its objects. A drawer has none, the apple's is among the options."""


@functools.cache
def originals() -> Mapping[str, str]:
    """Read ``originals.txt``: name of a file → the first digits of its id."""
    text = Path(__file__).with_name("originals.txt").read_text(encoding="utf-8")
    return {name: digits for digits, _, name in (line.partition(" ") for line in text.splitlines())}


def original_files(episode: EpisodeSpec, assets: Path) -> dict[str, Path]:
    """Find the files of an episode in the original's data folder: name → path, which need not exist."""
    return _files(episode, assets, assets / "hab2_bench_assets")


def port_files(episode: EpisodeSpec, folder: Path) -> dict[str, Path]:
    """Find the files of an episode in ManiSkill3's folder: name → path, which need not exist."""
    robot = {name: folder / WIDOWX / name.partition("/")[2] for name in originals() if name.startswith("widowx/")}
    return _files(episode, folder / BRIDGE, folder / BRIDGE) | robot


def distinct(wanted: Iterable[EpisodeSpec]) -> list[EpisodeSpec]:
    """Take one episode of all that need the same files."""
    return [*{(one.task, one.variant.name, one.stand.photo): one for one in wanted}.values()]


def photo(assets: Path, name: str) -> Path:
    """A background photo in the original's data folder."""
    return assets / "real_inpainting" / name


def stand_ins(files: Mapping[str, Path]) -> tuple[str, ...]:
    """Name the files that are there and not the benchmark's own."""
    return tuple(
        name.removeprefix("custom/models/")
        for name, path in files.items()
        if path.is_file() and not _blob_id(path).startswith(originals().get(name, "none"))
    )


def port_folder(folder: Path | None) -> Path:
    """Find ManiSkill3's folder: the given one, or else the environment's, or else its default."""
    return (folder or Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill")).absolute()


def drop_stale_caches(files: Iterable[Path]) -> None:
    """Take away what SAPIEN 2 wrote beside a stage that has been replaced since.

    Raises:
        InputError: If it cannot be taken away.
    """
    for stage in files:
        cache = stage.with_name(stage.name + CACHE)
        if cache.is_file() and stage.is_file() and cache.stat().st_mtime < stage.stat().st_ctime:
            try:
                cache.unlink(missing_ok=True)  # another worker may have been here
            except OSError as error:
                raise InputError(f"{cache} was made of another {stage.name}: delete it ({error})") from error


def missing_for_original(
    wanted: Iterable[EpisodeSpec], assets: Path | None, python: str | None, *, ray_tracing: bool
) -> list[str]:
    """List what the original needs for some episodes and does not find. Its interpreter is not started."""
    wanted, lacking = distinct(wanted), []
    if python is None or not os.access(python, os.X_OK):
        found = "" if python is None else f" ({python} cannot be run)"
        need = "SimplerEnv's own interpreter: Python 3.10 or 3.11, numpy < 2, gymnasium < 1, sapien 2.2.2" + found
        lacking.append(f"{need}. make sim-simpler-original makes it; then --python INTERPRETER")
    if (vulkan := vulkan_missing()) is not None:
        lacking.append(vulkan)
    if assets is None or not assets.is_dir():
        need = "SimplerEnv's assets (CC BY-NC)" + ("" if assets is None else f" ({assets} is no folder)")
        lacking.append(f"{need}. {ORIGINAL}; then --assets SimplerEnv/ManiSkill2_real2sim/data")
    else:
        files = {path for episode in wanted for path in original_files(episode, assets).values()}
        lacking += _absent(files, assets, f"They come with the repository: {ORIGINAL}")
        stages = assets / "hab2_bench_assets" / "stages"
        if stages.is_dir() and not os.access(stages, os.W_OK):
            lacking.append(f"The right to write to {stages}, where SAPIEN 2 keeps stages' shapes: copy the assets")
    if ray_tracing and any(episode.ray_traced for episode in wanted) and not glob.glob("/dev/nvidia[0-9]*"):
        need = "An NVIDIA GPU: the drawer and apple tasks are ray-traced"
        lacking.append(f"{need}. With --no-ray-tracing they run without, and are not called SIMPLER's")
    return lacking


def missing_for_port(wanted: Iterable[EpisodeSpec], folder: Path) -> list[str]:
    """List what the port to ManiSkill3 needs for some episodes and does not find."""
    wanted, lacking = distinct(wanted), []
    if absent := sorted({episode.name for episode in wanted if episode.port is None}):
        lacking.append(
            f"The port has no Google robot: not there are {', '.join(absent)}. Use the original: --backend ms2"
        )
    if importlib.util.find_spec("mani_skill") is None:
        lacking.append('ManiSkill3. pip install "lac-vla[simpler]"')
    if (vulkan := vulkan_missing()) is not None:
        lacking.append(vulkan)
    files = {path for episode in wanted if episode.port for path in port_files(episode, folder).values()}
    for part, name in DOWNLOADS.items():
        own = {path for path in files if path.is_relative_to(folder / part)}
        fetch = f"MS_ASSET_DIR={folder} python -m mani_skill.utils.download_asset {name}"
        lacking += _absent(own, folder / part, f"{fetch}; or --assets FOLDER, which holds data/")
    return lacking


def vulkan_missing() -> str | None:
    """Name a Vulkan driver, if there is none: SAPIEN does not even simulate without one."""
    named = [path for name in ICD_VARIABLES for path in os.environ.get(name, "").split(os.pathsep) if path]
    if any(map(os.path.exists, named)) or any(glob.glob(f"{folder}/*.json") for folder in ICD_FOLDERS):
        return None
    need = "A Vulkan driver: an NVIDIA GPU's, or Mesa's for CPUs, version 25 or later"
    return f"{need}. `make sim-simpler` unpacks Mesa beside the environment; `. .vulkan/env.sh` makes it known"


def _files(episode: EpisodeSpec, root: Path, stages: Path) -> dict[str, Path]:
    variant = episode.variant
    environment, options = variant.env_id, variant.options
    places = environment.startswith("PlaceInto")
    kind = "bridge_custom" if episode.robot.name == "widowx" else "pick_custom"
    baked = "_baked_tex" if "BakedTex" in environment or places else ""
    names = [f"custom/info_{kind}{baked}_{'v1' if places else 'v0'}.json"]
    if episode.stand.photo is not None:
        names.append(f"real_inpainting/{episode.stand.photo}")
    if "Drawer" in environment:
        names.append(f"custom/{options.get('station_name', 'mk_station')}.urdf")
        if options.get("station_name") == "mk_station3":
            names.append("custom/models/stone_tabletop.glb")
    for model in OBJECTS.get(environment, (str(options["model_ids"]),) if places else ()):
        own = f"custom/models/{model}/"
        names += [name for name in originals() if name.startswith(own) and not name.endswith(SKINS)]
        there = [skin for skin in SKINS if (root / own / skin).exists()]
        names.append(own + (there or [skin for skin in SKINS if own + skin in originals()])[0])
    files = {name: root / name for name in names}
    if not variant.scene.startswith("dummy"):
        files[f"stages/{variant.scene}.glb"] = stages / "stages" / f"{variant.scene}.glb"
    return files


def _absent(files: Iterable[Path], folder: Path, advice: str) -> list[str]:
    """Say which files of a folder are not there; nothing if none is absent."""
    files = sorted(files)
    absent = [str(path.relative_to(folder)) for path in files if not path.is_file()]
    if not absent:
        return []
    more = [f"… and {len(absent) - SHOWN} more"] if len(absent) > SHOWN else []
    need = f"{len(absent)} of {len(files)} files in {folder} (CC BY-NC). {advice}"
    return ["\n    ".join([need, *absent[:SHOWN], *more])]


@functools.cache
def _blob_id(path: Path) -> str:
    """Git's id of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
