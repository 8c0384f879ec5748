"""Names networks by their weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def checksum(networks: nn.Module) -> str:
    """Name networks by a checksum of all weights and their names, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in sorted(networks.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
