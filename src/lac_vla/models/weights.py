"""Checkpoint folders: reading their weights into a model that was built on ``meta``.

Weights are safetensors, or torch's own container where that is a family's official layout; see
:mod:`lac_vla.checkpoint_files`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lac_vla.checkpoint_files import check_finite_weights, read_json, safetensors_shapes, some
from lac_vla.errors import CheckpointError
from lac_vla.files import write_whole

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ("*.json", WEIGHTS, "model-*.safetensors")
WEIGHT_FILE = re.compile(r"[^/]*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack)")
ADAPTER = re.compile(r"[^/]+/adapter_(config\.json|model\..*)")
"""Files of a LoRA adapter in a subfolder."""
TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args)(?![a-z])|state\.pt$")
"""Files of a training run beside its model, which are none of the model's weights."""
WRAPPERS = {
    "module.": "they were saved from DistributedDataParallel; save the state dict of its .module",
    "base_model.model.": "they were saved from peft; save model.merge_and_unload()",
}
"""Prefixes of names that training code leaves behind → what mends it."""


def model_name(path_or_hub_id: str | Path, folder: Path) -> str:
    """Name a model for tables: its folder's last name; that of its repository where the folder is a hub's snapshot."""
    if not os.path.isdir(os.path.expanduser(path_or_hub_id)):
        return str(path_or_hub_id).rpartition("/")[2]
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name


def refuse_adapter(path_or_hub_id: str | Path, folder: Path) -> None:
    """Refuse a folder that holds an adapter, which would be ignored.

    Raises:
        CheckpointError: If it does.
    """
    if found := [file.name for file in folder.glob("adapter_*") if file.is_file()]:
        raise CheckpointError(
            f"'{path_or_hub_id}' holds a LoRA adapter that was never merged ({some(found)}): merge it into its base "
            "model (with peft: model.merge_and_unload().save_pretrained(FOLDER)) and give that folder"
        )


def refuse_unread(path_or_hub_id: str | Path, folder: Path, read: Iterable[str], family: str) -> None:
    """Refuse weights beside the model's own, local or on the hub, that nobody would read; warn of adapters below them.

    An adapter in a subfolder may be merged already, as the official OpenVLA-OFT training leaves it, or not.

    Args:
        path_or_hub_id: What the user gave.
        folder: Where it is.
        read: Patterns of the files that the family reads.
        family: Its name.

    Raises:
        CheckpointError: If there are any.
    """
    names = {file.relative_to(folder).as_posix() for file in (*folder.iterdir(), *folder.glob("*/adapter_*"))}
    if not os.path.isdir(os.path.expanduser(path_or_hub_id)):
        with suppress(Exception):  # without the hub, what was downloaded before is all there is
            names |= {file.rfilename for file in HfApi().model_info(str(path_or_hub_id), timeout=10).siblings or ()}
    if adapters := [name for name in names if ADAPTER.fullmatch(name)]:
        warnings.warn(
            f"'{path_or_hub_id}' holds a LoRA adapter in a subfolder ({some(adapters)}), whose weights are not read: "
            "the model acts without them unless they were merged into the folder's own (model.merge_and_unload())",
            stacklevel=3,
        )
    weights = [name for name in names if WEIGHT_FILE.fullmatch(name) and not TRAINER_STATE.match(name)]
    if unread := [name for name in weights if not any(fnmatch(name, pattern) for pattern in read)]:
        raise CheckpointError(
            f"'{path_or_hub_id}' holds weights that nobody reads for a model of the family {family}: {some(unread)}. "
            "The model would act without them. If they belong to it, it is of a family that is not supported, or they "
            "are pickled and must be saved as safetensors; if not, move them to another folder (from the hub: "
            "after 'hf download')"
        )


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    unused: re.Pattern[str],
    rename: Callable[[str], str] = str,
    precise: re.Pattern[str] | None = None,
    beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Put a folder's weights into a model on ``meta``, file by file; names and shapes are checked first.

    Args:
        model: Its parameters and persistent buffers are replaced.
        folder: Holds ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        dtype: Of the weights in memory.
        device: Where to put them.
        unused: Names that a checkpoint may hold although the model does not use them.
        rename: Name in the file → name in the model; ``unused`` means the latter.
        precise: Names of weights that are float32 whatever ``dtype`` says.
        beside: Weights from elsewhere; they take the place of those of the same parts (first names) in these files.

    Raises:
        CheckpointError: If a file is missing, truncated or not read by anybody, or names or shapes are not the model's.
    """
    wanted = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    files = _files(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= safetensors_shapes(file, unused, rename)
    elsewhere = {key.partition(".")[0] for key in beside}
    found = {key: shape for key, shape in found.items() if key.partition(".")[0] not in elsewhere}
    found |= {key: tuple(weight.shape) for key, weight in beside.items()}
    check_shapes(wanted, found)
    kept = {key: weight.to(device, dtype, copy=True) for key, weight in beside.items() if key in wanted}
    model.load_state_dict(kept, strict=False, assign=True)
    wanted = {key: shape for key, shape in wanted.items() if key not in kept}
    copy = device.type == "cpu"  # there, what is read is a view of the file, and badly aligned
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            keys = {rename(key): key for key in shard.keys()}  # noqa: SIM118
            part = {
                name: shard.get_tensor(keys[name]).to(
                    torch.float32 if precise and precise.match(name) else dtype, copy=copy
                )
                for name in wanted.keys() & keys.keys()
            }
        model.load_state_dict(part, strict=False, assign=True)
    check_finite_weights(folder, model, dtype)


def file_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a folder's weights, from the headers alone.

    Raises:
        CheckpointError: If a file is missing or truncated.
    """
    return {key: shape for file in _files(folder) for key, shape in safetensors_shapes(file).items()}


def write_weights(model: nn.Module, folder: Path, dtype: torch.dtype, rename: Callable[[str], str] = str) -> None:
    """Write a model's weights into a folder as one safetensors file, in ``dtype``, under the names of ``rename``."""
    weights = {rename(key): value.to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    write_whole(folder / WEIGHTS, lambda partial: save_file(weights, partial, metadata={"format": "pt"}))


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"{folder / INDEX} is damaged: it has no weight_map of names and files")
        files = [folder / name for name in sorted(set(index.values()))]
        if outside := [name for name in index.values() if Path(name).name != name]:
            raise CheckpointError(f"{folder / INDEX} names files outside of its folder: {some(outside)}")
    else:
        files = [folder / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: {some(missing)} missing (pickled weights are not read)")
    if more := {file.name for file in folder.glob("model*.safetensors")} - {file.name for file in files}:
        raise CheckpointError(
            f"{folder} holds two sets of weights: {some(more)} beside those that {INDEX} names, or without it: "
            "move away those that are not meant"
        )
    return files


def randomise(model: nn.Module, seed: int) -> None:
    """Fill in random weights: matrices and kernels normal with a variance of 1 / inputs, gains one, offsets zero."""
    generator: torch.Generator | None = None
    with torch.no_grad():
        for key, weight in model.named_parameters():
            generator = generator or torch.Generator(weight.device).manual_seed(seed)
            if weight.ndim > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(0.0 if key.endswith("bias") else 1.0)


def check_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes: the model's and the file's.

    Raises:
        CheckpointError: If they differ; it names some of what is missing, unexpected or misshapen.
    """
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    wrong = [
        f"{key} {found[key]} instead of {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    faults = [
        f"{len(names)} {what}: {some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    for prefix, advice in WRAPPERS.items():
        if unexpected and all(name.startswith(prefix) for name in found):
            faults.append(f"all names begin with '{prefix}': {advice}")
    if faults:
        raise CheckpointError("the weights are not those of the model in config.json; " + "; ".join(faults))
