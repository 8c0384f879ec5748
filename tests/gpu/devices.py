"""The devices that a test runs on: this machine's processor in CI, its GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from lac_vla.models import FAMILIES

torch.backends.cudnn.allow_tf32 = False  # a convolution in float32 is to be as exact as the processor's

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
)
DEVICES = ["cpu", GPU]
TINY = [family.tiny for family in FAMILIES.values()]
"""The smallest model of every family."""
