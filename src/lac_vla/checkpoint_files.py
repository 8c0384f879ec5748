"""Files of checkpoints and policies: JSON, safetensors, and torch's own container.

Of the latter, tensors and plain containers alone are read. No code of a checkpoint is ever run. Whatever is wrong with
a file becomes a :class:`CheckpointError` that names it.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lac_vla.errors import CheckpointError
from lac_vla.files import fault, read_object

SAFE_TORCH = "2.6"
AGAIN = "is the checkpoint's folder complete? If it is, the file is truncated or damaged: fetch it again"
NONE = re.compile(r"(?!)")
"""Matches nothing."""
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of weights that are plain values, by their names in safetensors; any other lacks a scale."""


def damaged(file: Path, error: object) -> CheckpointError:
    """Make the error of a file that cannot be read; it says what the file is, where that can be told."""
    return CheckpointError(fault(file, error, AGAIN))


def read_json(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        CheckpointError: If it is missing, too large, or holds something else.
    """
    return read_object(file, AGAIN, CheckpointError)


def safetensors_shapes(
    file: Path, unused: re.Pattern[str] = NONE, rename: Callable[[str], str] = str
) -> dict[str, tuple[int, ...]]:
    """Read the shapes by name, from the header alone; the file's length is checked against it.

    Args:
        file: The file.
        unused: Names of those that nobody needs: they are left out.
        rename: Name in the file → name to return, which ``unused`` means.

    Raises:
        CheckpointError: If the file cannot be read, or holds quantised weights.
    """
    shapes, quantised = {}, []
    try:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118
                if not unused.fullmatch(rename(key)):
                    part = shard.get_slice(key)
                    shapes[rename(key)] = tuple(part.get_shape())
                    quantised += [key] if part.get_dtype() not in PLAIN else []
    except Exception as error:  # the reader's own, the system's, or of a text that is none
        raise damaged(file, error) from error
    _refuse_quantised(file, quantised)
    return shapes


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file by name, on the CPU.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    try:
        return load_file(file)
    except Exception as error:  # the reader's own, the system's, or of a type that torch has not
        raise damaged(file, error) from error


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
        raise damaged(file, "it is no file of torch ≥ 1.6")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain containers, and nothing else is unpickled: "
            "where you trust it, load it with torch and save its state dicts alone"
        ) from error
    except Exception as error:  # whatever a damaged archive makes of torch's reader
        raise damaged(file, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not the dictionary of a checkpoint")
    return content


def check_tensors(file: Path, weights: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Refuse weights that are no tensors of plain numbers by names.

    Raises:
        CheckpointError: If one is not.
    """
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise CheckpointError(f"{file}: {name} is a {type(weight).__name__}, not a tensor")
    _refuse_quantised(file, [name for name, weight in weights.items() if weight.dtype not in PLAIN.values()])
    return dict(weights)


def check_finite_weights(where: object, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a module whose weights are not finite in ``dtype``, to which they were converted.

    Raises:
        CheckpointError: If one holds NaN or infinity; it names some.
    """
    weights = {name: weight for name, weight in module.state_dict().items() if weight.numel() and not weight.is_meta}
    ends = [end.float() for weight in weights.values() for end in weight.aminmax()]  # isfinite is 50 times slower
    finite = torch.stack(ends).view(-1, 2).isfinite().all(dim=1).tolist() if ends else []  # the GPU is read once
    if broken := [name for name, fine in zip(weights, finite, strict=True) if not fine]:
        advice = ", or give dtype bfloat16: float16 holds no more than 65504" if dtype == torch.float16 else ""
        raise CheckpointError(f"{where}: NaN or infinity in the weights {some(broken)}: fetch them again{advice}")


def some(names: Collection[str], limit: int = 4) -> str:
    """List some of many names."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (", …" if len(ordered) > limit else "")


def _refuse_quantised(file: Path, names: list[str]) -> None:
    if names:
        raise CheckpointError(
            f"{file} holds quantised weights, which are not read ({some(names)}): "
            "give the checkpoint from before quantisation, in bfloat16, float16 or float32"
        )
