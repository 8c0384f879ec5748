"""The task loss L_VLA of stage II: what a model's own head says about an action, from the decoder's hidden states."""

from __future__ import annotations

from lac_vla.errors import InputError
from lac_vla.models import CogACTBackbone
from lac_vla.models.base import Backbone
from lac_vla.training.tasks.base import Task
from lac_vla.training.tasks.diffusion import DiffusionTask
from lac_vla.training.tasks.tokens import SpeaksTokens, TokenTask

__all__ = ["DiffusionTask", "Task", "TokenTask", "task_of"]


def task_of(backbone: Backbone) -> Task:
    """The task of a model family.

    Raises:
        InputError: If none is known for it.
    """
    if isinstance(backbone, SpeaksTokens):
        return TokenTask(backbone)
    if isinstance(backbone, CogACTBackbone):
        return DiffusionTask(backbone)
    raise InputError(f"{backbone.name} has no task loss that `lac train` knows")
