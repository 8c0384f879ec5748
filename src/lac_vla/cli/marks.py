"""Marks for tyro, which reads a verb's options off its function."""

from typing import Any

import tyro

FLAT: Any = tyro.conf.arg(name="")
"""Marks a config dataclass whose fields are options of the command itself."""
