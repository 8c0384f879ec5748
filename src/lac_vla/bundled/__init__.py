"""What comes with the package: two small VLAs with their caching policies, trained on scripted demonstrations."""

from pathlib import Path

MINI = Path(__file__).parent / "mini"
"""Checkpoint folder of the bundled VLA with action tokens, for :func:`lac_vla.load_vla`; its README is its model card."""
MINI_COGACT = Path(__file__).parent / "mini-cogact"
"""Of the bundled VLA with CogACT's diffusion head on the same trunk."""
