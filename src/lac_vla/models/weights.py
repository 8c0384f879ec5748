"""Checkpoint folders: finding them, and reading their weights into a model that was built on ``meta``.

Weights are safetensors, or torch's own container where that is a family's official layout; of it, tensors and plain
containers alone are read. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lac_vla.errors import CheckpointError
from lac_vla.files import write_whole

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
HUB_FILES = ("*.json", "*.safetensors")
HUB_IGNORED = ("lora_adapter/*.safetensors",)
"""Weights that are merged into those of the model already."""
SAFE_TORCH = "2.6"
LISTED = 4
"""The number of names that an error message lists at most."""


def find_folder(path_or_hub_id: str | Path, files: Iterable[str] = HUB_FILES) -> Path:
    """Find a checkpoint's folder: a local one, or ``owner/name`` on the Hugging Face hub, downloaded once.

    ``files`` are the patterns of what to download.

    Raises:
        CheckpointError: If there is none.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(path_or_hub_id)):
        raise CheckpointError(f"'{path_or_hub_id}' is neither a folder nor a hub id (owner/name)")
    try:
        return Path(
            snapshot_download(str(path_or_hub_id), allow_patterns=list(files), ignore_patterns=list(HUB_IGNORED))
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path_or_hub_id}' is no local folder, and the hub says: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        CheckpointError: If it is missing or holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: is the checkpoint's folder complete?") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is damaged: it does not hold a JSON object")
    return data


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
    read: Iterable[str] = (),
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
        read: Names of the folder's files that they were read from.

    Raises:
        CheckpointError: If a file is missing, truncated or not read by anybody, or names or shapes are not the model's.
    """
    wanted = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    files = _files(folder)
    refuse_unread(folder, [*(file.name for file in files), *read])
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= {rename(key): shape for key, shape in _shapes(file).items()}
    elsewhere = {key.partition(".")[0] for key in beside}
    found = {key: shape for key, shape in found.items() if key.partition(".")[0] not in elsewhere}
    found |= {key: tuple(weight.shape) for key, weight in beside.items()}
    check_shapes(wanted, {key: shape for key, shape in found.items() if not unused.fullmatch(key)})
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


def file_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a folder's weights, from the headers alone.

    Raises:
        CheckpointError: If a file is missing or truncated.
    """
    return {key: shape for file in _files(folder) for key, shape in _shapes(file).items()}


def write_weights(model: nn.Module, folder: Path, dtype: torch.dtype, rename: Callable[[str], str] = str) -> None:
    """Write a model's weights into a folder as one safetensors file, in ``dtype``, under the names of ``rename``."""
    weights = {rename(key): value.to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    write_whole(folder / WEIGHTS, lambda partial: save_file(weights, partial, metadata={"format": "pt"}))


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f"{folder / INDEX} is damaged: it has no weight_map")
        files = [folder / name for name in sorted(set(index.values()))]
    else:
        files = [folder / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} is incomplete: {_some(missing)} missing (pickled weights are not read)")
    return files


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes by name, from the header alone; the file's length is checked against it."""
    try:
        with safe_open(file, framework="pt") as shard:
            return {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}): fetch it again") from error


def refuse_unread(folder: Path, read: Iterable[str]) -> None:
    """Refuse weights that lie in a folder and that its model does not read: it would be another one than was meant.

    Args:
        folder: Its own files are looked at, not those in folders within.
        read: Names of those that are read.

    Raises:
        CheckpointError: If there are others.
    """
    unread = {file.name for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES} - {*read}
    if unread:
        raise CheckpointError(
            f"{folder} holds weights that its model does not read: {_some(unread)}. Take away what is not part of it"
        )


def read_torch(file: Path) -> dict[str, Any]:
    """Open a ``.pt`` file of ``torch.save``; its tensors stay on disk, mapped into memory, until they are copied.

    Torch's restricted unpickler makes tensors and plain containers, and refuses everything else. The restriction has
    had holes: up to torch 2.5 code could be run (CVE-2025-32434), so that these versions are refused here; up to 2.9
    memory could be corrupted (CVE-2026-24747): with those, read files of people you trust.

    Raises:
        CheckpointError: If the file is missing, damaged, of torch's format of before 1.6 (which cannot be mapped), or
            holds anything else; or if torch is too old.
    """
    if torch.__version__ < SAFE_TORCH:
        raise CheckpointError(f"{file}: .pt files are read with torch ≥ {SAFE_TORCH}, this is {torch.__version__}")
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is missing, truncated, or no file of torch ≥ 1.6: fetch it again")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain containers, and nothing else is unpickled: "
            "where you trust it, load it with torch and save its state dicts alone"
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not the dictionary of a checkpoint")
    return content


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
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if faults:
        raise CheckpointError("the weights are not those of the model in config.json; " + "; ".join(faults))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:LISTED]) + (", …" if len(ordered) > LISTED else "")
