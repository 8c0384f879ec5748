"""Learned adaptive visual token caching for Vision-Language-Action policies.

Names are imported when they are first used: a look at ``lac --help`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lac_vla.engine.options import EngineOptions as EngineOptions
    from lac_vla.engine.step_info import StepInfo as StepInfo
    from lac_vla.errors import CheckpointError as CheckpointError
    from lac_vla.errors import InputError as InputError
    from lac_vla.errors import LacError as LacError
    from lac_vla.errors import MissingExtraError as MissingExtraError
    from lac_vla.errors import NonFiniteError as NonFiniteError
    from lac_vla.factory import CachedVLA as CachedVLA
    from lac_vla.factory import ModelOptions as ModelOptions
    from lac_vla.models import VLA as VLA
    from lac_vla.models import load_vla as load_vla
    from lac_vla.models import random_vla as random_vla
    from lac_vla.models import save_vla as save_vla
    from lac_vla.policies import CachePolicy as CachePolicy
    from lac_vla.policies import Dense as Dense
    from lac_vla.policies import LACConfig as LACConfig
    from lac_vla.policies import LACPolicy as LACPolicy
    from lac_vla.policies import Motion as Motion
    from lac_vla.policies import Random as Random
    from lac_vla.policies import make_policy as make_policy
    from lac_vla.session import Session as Session
    from lac_vla.types import Decision as Decision
    from lac_vla.types import Frame as Frame
    from lac_vla.types import PolicyInput as PolicyInput
    from lac_vla.types import TokenLayout as TokenLayout

__version__ = "0.2.0"

_HOMES = {
    "engine.options": ("EngineOptions",),
    "engine.step_info": ("StepInfo",),
    "errors": ("CheckpointError", "InputError", "LacError", "MissingExtraError", "NonFiniteError"),
    "factory": ("CachedVLA", "ModelOptions"),
    "models": ("VLA", "load_vla", "random_vla", "save_vla"),
    "policies": ("CachePolicy", "Dense", "LACConfig", "LACPolicy", "Motion", "Random", "make_policy"),
    "session": ("Session",),
    "types": ("Decision", "Frame", "PolicyInput", "TokenLayout"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lac_vla' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"lac_vla.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
