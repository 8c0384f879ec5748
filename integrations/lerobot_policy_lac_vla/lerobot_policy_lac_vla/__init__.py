"""Registers lac-vla's policy with LeRobot, which imports this package for its name."""

from lac_vla.lerobot.configuration_lac_vla import LacVlaConfig

__all__ = ["LacVlaConfig"]
