"""Decoders of the section ``engine``: presets without a purpose but to be timed."""

from __future__ import annotations

from lac_vla.types import TokenLayout

SHAPES = ("llama-8x512", "llama-32x4096")
"""Presets (layers × width). The second is OpenVLA's Llama 2 7B."""

LAYOUT = TokenLayout.of({"camera": (16, 16)}, n_prefix=1, n_suffix=25)
"""OpenVLA's prompt with a LIBERO instruction: BOS, 256 visual tokens, 25 of text."""
