"""The model that is measured: a checkpoint, or random weights; refused if it cannot fit."""

from __future__ import annotations

from pathlib import Path

import torch

from lac_vla.bench.config import BenchConfig
from lac_vla.checks import check_device
from lac_vla.errors import InputError
from lac_vla.models import VLA, load_vla, random_vla
from lac_vla.models.float8 import store_in_float8
from lac_vla.models.heads.tokens import TokenHead


def open_model(config: BenchConfig) -> VLA:
    """Open the model of the sections ``frame``, ``memory`` and ``batch``.

    Raises:
        InputError: If there is no such model or device, or it does not fit into memory.
        CheckpointError: If the checkpoint cannot be used.
    """
    if config.random_weights is not None:
        random = open_random(config.random_weights, config)
        if config.acceptance and not isinstance(random.head, TokenHead):
            raise InputError(f"{random.name} appends no tokens that could be drafted: leave acceptance out")
        return random
    model = load_vla(str(config.model), dtype=config.dtype, device=config.device, unnorm_key=config.unnorm_key)
    if config.float8:
        store_in_float8(model)
    return model


def open_shapes(config: BenchConfig) -> VLA:
    """Open the model of the section ``roofline``: of random weights the shapes alone, without memory."""
    if config.random_weights is not None:
        return random_vla(config.random_weights, device="meta")
    return open_model(config)


def open_random(model: str, config: BenchConfig) -> VLA:
    """Make a model with random weights, by the name of a preset, unless it does not fit into memory."""
    device, dtype = check_device(config.device), config.dtype
    _check_memory(random_vla(model, dtype=dtype, device="meta"), device)
    made = random_vla(model, seed=config.seed, dtype=dtype, device=device)
    if config.float8:
        store_in_float8(made)
    return made


def _check_memory(model: VLA, device: torch.device) -> None:
    """Refuse weights that are larger than the free memory, before a single one is made."""
    needed = sum(weight.numel() * weight.element_size() for weight in model.module.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{model.name}: its weights take {needed / 1e9:.1f} GB as {model.dtype}, and {free / 1e9:.1f} GB "
            f"are free on {device}: give another dtype or device, or a smaller model"
        )


def _free_memory() -> int | None:
    """Read the memory that can be had without swapping, bytes; ``None`` where Linux's ``/proc`` is missing."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(size[1]) * 1024 for size in sizes), None)
