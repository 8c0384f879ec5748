"""Model families: loaded from a checkpoint, made with random weights, saved. A family is a folder and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from lac_vla.bundled import BUNDLED, find_model
from lac_vla.checkpoint_files import read_json
from lac_vla.checks import check_device, find_dtype, shortened
from lac_vla.errors import CheckpointError, InputError, LacError, did_you_mean
from lac_vla.hub import find_folder
from lac_vla.models.cogact.checkpoint import HUB_FILES as COGACT_FILES
from lac_vla.models.cogact.checkpoint import load_cogact, new_cogact, random_cogact, save_cogact
from lac_vla.models.cogact.config import PRESETS as COGACT_PRESETS
from lac_vla.models.cogact.config import CogACTConfig
from lac_vla.models.lerobot_layout import HUB_FILES as LEROBOT_FILES
from lac_vla.models.oft.checkpoint import HUB_FILES as OFT_FILES
from lac_vla.models.oft.checkpoint import OPTIONS as OFT_OPTIONS
from lac_vla.models.oft.checkpoint import load_oft, new_oft, random_oft, save_oft
from lac_vla.models.oft.config import PRESETS as OFT_PRESETS
from lac_vla.models.oft.config import OFTConfig
from lac_vla.models.oft.official import MARKS
from lac_vla.models.pi0.checkpoint import OPTIONS as PI0_OPTIONS
from lac_vla.models.pi0.checkpoint import load_pi0, new_pi0, random_pi0, save_pi0
from lac_vla.models.pi0.config import PI0_PRESETS, PI05_PRESETS, PiConfig
from lac_vla.models.plugged import is_plugin, load_plugin
from lac_vla.models.prismatic.checkpoint import CONFIG, load_prismatic, new_prismatic, random_prismatic, save_prismatic
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.presets import PRESETS
from lac_vla.models.smolvla.checkpoint import load_smolvla, new_smolvla, random_smolvla, save_smolvla
from lac_vla.models.smolvla.config import PRESETS as SMOLVLA_PRESETS
from lac_vla.models.smolvla.config import SmolVLAConfig
from lac_vla.models.tokenizer import Encode
from lac_vla.models.vla import VLA
from lac_vla.models.weights import HUB_FILES, model_name, refuse_adapter, refuse_unread
from lac_vla.plugins import MODELS, announced

__all__ = ["FAMILIES", "VLA", "Encode", "Family", "is_plugin", "load_vla", "random_vla", "save_vla", "untrained_vla"]


WRONG_VALUES = (ArithmeticError, AttributeError, LookupError, StrictDataclassError, TypeError, ValueError)
"""What Python makes of a value of another kind than was expected."""


@dataclass(frozen=True)
class Family:
    """Everything that is known of a model family.

    Attributes:
        load: Reads a checkpoint's folder, given the contents of its ``config.json``.
        save: Writes one.
        build: Makes a model with starting weights of a configuration, given statistics and a tokenizer.
        random: Makes a model with random weights of a configuration.
        config: Class of its configurations.
        presets: Configurations by name.
        tiny: The preset that tests run.
        hub_files: Patterns of all files that ``load`` reads: they are downloaded, and any other weights are refused.
        marks: Patterns of files in a checkpoint's folder that tell this family, whatever ``config.json`` says.
        options: Arguments of ``load`` beside those that every family has.
        based_on: ``model_type`` of its official checkpoints, another family's; where no file tells, options do.
    """

    load: Callable[..., VLA]
    save: Callable[[VLA, Path, torch.dtype], None]
    build: Callable[..., VLA]
    random: Callable[..., VLA]
    config: type
    presets: Mapping[str, Any]
    tiny: str
    hub_files: Sequence[str] = HUB_FILES
    marks: Sequence[str] = ()
    options: Sequence[str] = ()
    based_on: Sequence[str] = ()


FAMILIES: dict[str, Family] = {
    "openvla": Family(
        load_prismatic, save_prismatic, new_prismatic, random_prismatic, PrismaticConfig, PRESETS, "tiny"
    ),
    "cogact": Family(
        load_cogact, save_cogact, new_cogact, random_cogact, CogACTConfig, COGACT_PRESETS, "cogact-tiny", COGACT_FILES
    ),
    "pi0": Family(
        load_pi0, save_pi0, new_pi0, random_pi0, PiConfig, PI0_PRESETS, "pi0-tiny", LEROBOT_FILES, options=PI0_OPTIONS
    ),
    "pi05": Family(
        load_pi0, save_pi0, new_pi0, random_pi0, PiConfig, PI05_PRESETS, "pi05-tiny", LEROBOT_FILES, options=PI0_OPTIONS
    ),
    "smolvla": Family(
        load_smolvla,
        save_smolvla,
        new_smolvla,
        random_smolvla,
        SmolVLAConfig,
        SMOLVLA_PRESETS,
        "smolvla-tiny",
        LEROBOT_FILES,
        options=("tokenizer",),
    ),
    "oft": Family(
        load_oft,
        save_oft,
        new_oft,
        random_oft,
        OFTConfig,
        OFT_PRESETS,
        "oft-tiny",
        OFT_FILES,
        MARKS,
        OFT_OPTIONS,
        ("openvla",),
    ),
}
"""``model_type``, or LeRobot's ``type``, in a checkpoint's ``config.json`` → family, unless its files tell another."""


def load_vla(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    unnorm_key: str | None = None,
    cameras: Sequence[str] | None = None,
    image_pipeline: str | None = None,
    encode: Encode | None = None,
    **options: Any,
) -> VLA:
    """Load a VLA from a checkpoint in its official layout.

    Weights are read from safetensors; official CogACT's from the ``.pt`` file of its run, of which tensors alone are
    unpickled.
    LeRobot's checkpoints hold no tokenizer: pass ``tokenizer``.
    An OpenVLA-OFT folder is known by the files beside its weights; it does not say what robot it is for: pass
    ``platform`` (``"libero"``, ``"aloha"``, ``"bridge"``), or ``chunk``, ``bounds`` and ``cameras``.
    A CogACT run holds no tokenizer: put Llama 2's ``tokenizer.json`` beside its ``config.json``, or pass ``encode``.

    Args:
        path_or_hub_id: A folder, the name of a bundled model, ``owner/name`` on the Hugging Face hub (downloaded
            once), or a plug-in, see :mod:`lac_vla.models.plugged`.
        dtype: Of the weights in memory, or its name; ``"auto"`` for bfloat16 on a GPU and float32 elsewhere.
        device: Where to put them.
        unnorm_key: Data set whose statistics give actions their units; needed if the checkpoint has several.
        cameras: Names of the cameras in ``Frame.images``, in the model's order; ``None`` for its own names.
        image_pipeline: ``"resize-naive"``, ``"letterbox"``, ``"resize-crop"``, ``"libero"`` (OpenVLA's LIBERO
            evaluation) or ``"area"``; of LeRobot's policies ``"lerobot"``, ``"lerobot-0.4"``, which pads with −3, or
            ``"openpi"``; ``None`` for the checkpoint's own.
        encode: Text → token ids, in place of the checkpoint's tokenizer.
        options: Of some families alone; ``None`` for what the checkpoint says. OpenVLA-OFT's: see
            :func:`lac_vla.models.oft.official.configure`. LeRobot's policies': ``tokenizer``, folder or hub id that
            holds the ``tokenizer.json``. π0's and π0.5's: ``state_prompt``, how the prompt tells the state
            (``"given"`` as LeRobot 0.6 and openpi do, ``"padded"`` with zeros as LeRobot 0.4 does, or ``"none"``,
            openpi's ``discrete_state_input=False``), and ``relative_actions``, how many leading values of the actions
            are relative to the state (6 for openpi's π0 for LIBERO, whose files do not say so).

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: If the checkpoint is missing, truncated, inconsistent or of an unknown family.
        InputError: If ``unnorm_key``, ``cameras``, ``image_pipeline``, ``dtype`` or an option do not fit it, or there
            is no such ``device`` here.
    """
    device = check_device(device)
    dtype = find_dtype(dtype, device)
    path_or_hub_id = find_model(str(path_or_hub_id))
    settings = {
        "unnorm_key": unnorm_key, "cameras": cameras, "image_pipeline": image_pipeline, "encode": encode, **options
    }  # fmt: skip
    plugged = partial(
        load_plugin, device=device, dtype=dtype, settings={k: v for k, v in settings.items() if v is not None}
    )
    if is_plugin(path_or_hub_id):
        return plugged(path_or_hub_id)
    marks = [mark for family in FAMILIES.values() for mark in family.marks]
    folder = find_folder(path_or_hub_id, (*HUB_FILES, *marks), BUNDLED)
    refuse_adapter(path_or_hub_id, folder)
    data = read_json(folder / CONFIG)
    model_type = data.get("model_type")
    if isinstance(model_type, str) and model_type in announced(MODELS):
        return plugged(model_type, path=folder)
    options = {key: value for key, value in options.items() if value is not None}
    name = _name_of(folder, data, options)
    family = FAMILIES[name]
    if unknown := sorted(options.keys() - {*family.options}):
        raise InputError(f"a model of the family '{name}' takes no {', '.join(unknown)}: leave it out")
    if family.hub_files != HUB_FILES:
        folder = find_folder(path_or_hub_id, family.hub_files)
    refuse_unread(path_or_hub_id, folder, family.hub_files, name)
    try:
        return family.load(
            folder,
            data,
            name=model_name(path_or_hub_id, folder),
            dtype=dtype,
            device=device,
            unnorm_key=unnorm_key,
            cameras=cameras,
            image_pipeline=image_pipeline,
            encode=encode,
            **options,
        )
    except LacError:
        raise
    except WRONG_VALUES as error:
        raise CheckpointError(
            f"{folder}: {CONFIG} and the files beside it do not describe a model of the family '{name}' "
            f"({shortened(error)}): fetch them again, or give the family's own layout"
        ) from error


def _name_of(folder: Path, data: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Tell a checkpoint's family: by its files; by options that one alone has; or by what it says."""
    said: Any = data.get("model_type", data.get("type"))  # the latter is LeRobot's
    for name, family in FAMILIES.items():
        asked = said in family.based_on and options.keys() & {*family.options}
        if asked or any(next(folder.glob(mark), None) for mark in family.marks):
            return name
    if said is None:  # neither CogACT's, a training run's, nor openpi's say so
        said = "cogact" if "vla" in data else "pi0" if "action_horizon" in data else None
    if not isinstance(said, str) or said not in FAMILIES:
        raise CheckpointError(f"{folder / CONFIG}: model_type is {said!r}; known are {list(FAMILIES)}, and plug-ins")
    return said


def save_vla(vla: VLA, folder: str | Path, *, dtype: torch.dtype | str = torch.bfloat16) -> None:
    """Write a model so that :func:`load_vla` reads it: configuration, weights, statistics, tokenizer.

    Args:
        vla: What to write.
        folder: Made if need be; files of these names in it are replaced.
        dtype: Of the weights in the file, or its name.

    Raises:
        InputError: If the model is a plug-in's, which writes its own.
    """
    if vla.family not in FAMILIES:
        raise InputError(f"{vla.name} is no model of {list(FAMILIES)}: save its weights yourself")
    FAMILIES[vla.family].save(vla, Path(folder).expanduser(), find_dtype(dtype, vla.device))


def random_vla(
    config: Any, *, seed: int = 0, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> VLA:
    """Make a model of any size with random weights, to test and to time with. No file is read.

    Args:
        config: A family's configuration, or a preset's name: ``"openvla-7b"``, ``"mini"``, ``"mini-vit"``, ``"tiny"``,
            ``"cogact-7b"``, ``"mini-cogact"``, ``"cogact-tiny"``, ``"openvla-7b-oft"``, ``"mini-oft"``,
            ``"mini-widowx"``, ``"oft-tiny"``, ``"pi0"``, ``"pi05"``, ``"pi05-shallow"``, ``"pi0-tiny"``,
            ``"pi05-tiny"``, ``"smolvla-base"``, ``"mini-flow"``, ``"smolvla-tiny"``.
        seed: Of the weights.
        dtype: Of the weights; as in :func:`load_vla`.
        device: Where they are made; ``"meta"`` for shapes only.

    Raises:
        InputError: If there is no configuration of that name.
    """
    device = check_device(device, meta=True)
    name = config if isinstance(config, str) else "random"
    family, config = _family(config)
    return family.random(config, name=name, seed=seed, dtype=find_dtype(dtype, device), device=device)


def untrained_vla(preset: str, statistics: Mapping[str, Any], encode: Encode) -> VLA:
    """Make a model to be trained: starting weights by torch's own generator, float32, on the CPU.

    Args:
        preset: See :func:`random_vla`.
        statistics: Data set → statistics of its actions and proprioception.
        encode: The tokenizer.

    Raises:
        InputError: If there is no preset of that name.
    """
    family, config = _family(preset)
    return family.build(config, statistics, encode, name=preset)


def _family(model: Any) -> tuple[Family, Any]:
    """Find the family of a configuration, and the configuration itself where ``model`` is a preset's name."""
    presets = {key: preset for family in FAMILIES.values() for key, preset in family.presets.items()}
    config = presets.get(model) if isinstance(model, str) else model
    for family in FAMILIES.values():
        if isinstance(config, family.config):
            return family, config
    raise InputError(f"unknown model {model!r}{did_you_mean(str(model), presets)}; choose one of {list(presets)}")
