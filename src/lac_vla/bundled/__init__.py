"""What comes with the package: the small VLA ``mini``, trained on scripted demonstrations of libero_spatial."""

from pathlib import Path

MINI = Path(__file__).parent / "mini"
"""Checkpoint folder of the bundled VLA, for :func:`lac_vla.load_vla`; its README says how it was made."""
