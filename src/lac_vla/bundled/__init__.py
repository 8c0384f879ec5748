"""What comes with the package: three small VLAs and caching policies, trained on scripted demonstrations.

Each is a checkpoint folder for :func:`lac_vla.load_vla`; its README says how it was made.
"""

from pathlib import Path

MINI = Path(__file__).parent / "mini"
"""Answers in action tokens."""
MINI_VIT = Path(__file__).parent / "mini-vit"
"""The same, but a vision transformer sees the first camera: a tower that can reuse."""
MINI_COGACT = Path(__file__).parent / "mini-cogact"
"""Draws chunks of actions with CogACT's diffusion head, on a trunk that started as the other's."""
