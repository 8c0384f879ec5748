"""The precision that training multiplies in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

AUTOCAST: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""True if this CPU computes bfloat16 products in hardware; one that does not is ten times faster without them."""


def autocast(device: torch.device) -> Any:
    """Let a float32 model on a CPU multiply in bfloat16; a model on a GPU has its own dtype already."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if device.type == "cpu" and AUTOCAST else nullcontext()
