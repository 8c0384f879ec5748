"""The model card of a learned policy: what it was made for, how it was trained, how to use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lac_vla.hub import HUB_ID
from lac_vla.policies.lac.config import LACConfig


def model_card(config: LACConfig, about: Mapping[str, Any], name: str = "FOLDER") -> str:
    """Write a card in Markdown, with the metadata that the Hugging Face hub reads in front.

    Args:
        config: The policy's shape.
        about: How it came about, as ``lac train`` notes it; may be empty.
        name: Where it is found: a folder, or ``owner/name``.
    """
    training: Mapping[str, Any] = about.get("training", {})
    given = str(training.get("model", "MODEL"))
    model = Path(given).name if os.path.isabs(given) else given
    head = ["library_name: lac-vla", "pipeline_tag: robotics", "tags: [lac-vla, vision-language-action, token-caching]"]
    if HUB_ID.fullmatch(model) and not os.path.exists(model):
        head.append(f"base_model: {model}")
    grids = ", ".join(f"{camera} {rows} × {cols}" for camera, (rows, cols) in config.grids.items())
    lines = [
        *("---", *head, "---", ""),
        "# A LAC caching policy",
        "",
        "Chooses, frame by frame, which visual tokens of a frozen Vision-Language-Action model are recomputed and",
        "which are reused (*Learning to Accelerate Vision-Language-Action Models through Adaptive Visual Token",
        "Caching*, [arXiv 2602.00686](https://arxiv.org/abs/2602.00686)).",
        "",
        f"It fits models with the visual tokens {grids}; optical flow: {config.flow}.",
        "",
        "## Use",
        "",
        "```python",
        "from lac_vla import CachedVLA",
        "",
        f'vla = CachedVLA.from_pretrained("{model}", policy="lac:path={name}")',
        "```",
        "",
        f"    lac eval --model {model} --policies dense lac:path={name} --out outputs/eval",
        "",
    ]
    if training:
        shown = {
            key: training[key] for key in ("model", "dataset", "loss", "window", "target_ratio") if training.get(key)
        }
        settings = ", ".join(f"{key} {model if key == 'model' else value}" for key, value in shown.items())
        lines += ["## Training", "", f"`lac train`: {settings}."]
        if "steps" in about:
            lines.append(f"{about['steps']} steps, {about.get('frames')} frames of {about.get('episodes')} episodes.")
        lines += ["`config.json` holds every setting, versions and hardware, under `about`.", ""]
    return "\n".join(lines)
