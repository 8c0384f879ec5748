"""Models that come with the package: small VLAs and caching policies, trained on scripted demonstrations.

Each is a checkpoint folder for :func:`lac_vla.load_vla`; its README says how it was made.
"""

from pathlib import Path

MINI = Path(__file__).parent / "mini"
"""Answers in action tokens."""
MINI_VIT = Path(__file__).parent / "mini-vit"
"""The same, but a vision transformer sees the first camera: a tower that can reuse."""
MINI_COGACT = Path(__file__).parent / "mini-cogact"
"""Draws chunks of actions with CogACT's diffusion head, on a trunk that started as the other's."""
MINI_FLOW = Path(__file__).parent / "mini-flow"
"""A small SmolVLA: draws chunks by flow matching, behind a prefix whose tokens see each other. It comes with a checkout
alone, so that the wheel stays below 20 MB."""

BUNDLED = {folder.name: folder for folder in (MINI, MINI_VIT, MINI_COGACT, MINI_FLOW) if folder.is_dir()}


def find_model(name: str) -> str:
    """The folder of a bundled model given by its name; any other folder or hub id as it is."""
    return str(BUNDLED[name]) if name in BUNDLED and not Path(name).exists() else name
