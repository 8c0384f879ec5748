"""Learned adaptive visual token caching for Vision-Language-Action policies."""

from lac_vla.engine.options import EngineOptions
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import CheckpointError, InputError, LacError, MissingExtraError, NonFiniteError
from lac_vla.factory import CachedVLA, ModelOptions
from lac_vla.models import VLA, load_vla, random_vla, save_vla
from lac_vla.policies import CachePolicy, Dense, LACConfig, LACPolicy, Motion, Random, make_policy
from lac_vla.session import Session
from lac_vla.types import Decision, Frame, PolicyInput, TokenLayout

__version__ = "0.2.0"

__all__ = [
    "VLA",
    "CachePolicy",
    "CachedVLA",
    "CheckpointError",
    "Decision",
    "Dense",
    "EngineOptions",
    "Frame",
    "InputError",
    "LACConfig",
    "LACPolicy",
    "LacError",
    "MissingExtraError",
    "ModelOptions",
    "Motion",
    "NonFiniteError",
    "PolicyInput",
    "Random",
    "Session",
    "StepInfo",
    "TokenLayout",
    "load_vla",
    "make_policy",
    "random_vla",
    "save_vla",
]
