"""From host to device, with nobody waiting: a frame leaves the GPU's queue full until the action is read."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def upload(values: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring host data to a device without waiting for the copy.

    On a GPU by way of pinned memory, which torch keeps and lends again once the copy is done; on a CPU the result
    shares its memory with ``values``.

    Args:
        values: On the host; not to be changed afterwards.
        device: Where to.
    """
    host = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def upload_ids(ids: Any, device: torch.device) -> torch.Tensor:
    """Bring token ids to a device without waiting: a sequence, or a tensor that may be there; int64."""
    if isinstance(ids, torch.Tensor):
        return ids.to(device)
    return upload(np.asarray(ids, dtype=np.int64), device)


@cache  # without a limit: a CUDA graph reads it where it is
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Get numbers that never change as a vector on a device; it is copied there once, and not to be written to."""
    with torch.inference_mode(mode=False):  # it may meet a gradient later
        return torch.tensor(values, device=device, dtype=dtype)
