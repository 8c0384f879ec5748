"""Checkpoint folders: finding them, and reading their weights into a model that was built on ``meta``.

Weights are safetensors, or torch's own container where that is a family's official layout; of it, tensors and plain
containers alone are read. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
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
HUB_FILES = ("*.json", "*.safetensors")
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
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=list(files)))
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
    model: nn.Module, folder: Path, *, dtype: torch.dtype, device: torch.device, unused: re.Pattern[str]
) -> None:
    """Put a folder's weights into a model on ``meta``, file by file; names and shapes are checked first.

    The folder holds ``model.safetensors``, or shards and ``model.safetensors.index.json``. Weights end up in ``dtype``
    on ``device``; ``unused`` names those that a checkpoint may hold although the model does not use them.

    Raises:
        CheckpointError: If a file is missing or truncated, or names or shapes are not the model's.
    """
    wanted = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    files = _files(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found |= _shapes(file)
    check_shapes(wanted, {key: shape for key, shape in found.items() if not unused.fullmatch(key)})
    copy = device.type == "cpu"  # there, what is read is a view of the file, and badly aligned
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            keys = wanted.keys() & shard.keys()
            part = {key: shard.get_tensor(key).to(dtype, copy=copy) for key in keys}
        model.load_state_dict(part, strict=False, assign=True)


def write_weights(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write a model's weights into a folder as one safetensors file, in ``dtype``."""
    weights = {key: value.to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
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
