"""Learned adaptive visual token caching for Vision-Language-Action policies."""

from lac_vla.errors import CheckpointError, InputError, LacError, MissingExtraError
from lac_vla.levers import Levers
from lac_vla.models import PrismaticBackbone, load_vla, random_vla, save_vla
from lac_vla.policies import CachePolicy, Dense, LACConfig, LACPolicy, Motion, Random, make_policy
from lac_vla.step import Step
from lac_vla.types import Decision, Frame, TokenLayout, View
from lac_vla.vla import CachedVLA, Session

__version__ = "0.1.0"

__all__ = [
    "CachePolicy",
    "CachedVLA",
    "CheckpointError",
    "Decision",
    "Dense",
    "Frame",
    "InputError",
    "LACConfig",
    "LACPolicy",
    "LacError",
    "Levers",
    "MissingExtraError",
    "Motion",
    "PrismaticBackbone",
    "Random",
    "Session",
    "Step",
    "TokenLayout",
    "View",
    "load_vla",
    "make_policy",
    "random_vla",
    "save_vla",
]
