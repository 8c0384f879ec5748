"""The policy's settings, registered with LeRobot as ``lac_vla``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from lac_vla.errors import MissingExtraError

try:
    from lerobot.configs.policies import PreTrainedConfig
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lerobot":
        raise
    raise MissingExtraError("lerobot", "LeRobot's policy") from error

NO_TRAINING = "lac_vla runs a finished VLA inside LeRobot; train its caching policy with `lac train`"


@PreTrainedConfig.register_subclass("lac_vla")
@dataclass
class LacVlaConfig(PreTrainedConfig):  # type: ignore[misc]
    """What to run. LeRobot's own fields come on top.

    Attributes:
        model: Checkpoint folder or hub id.
        policy: Caching policy: ``lac`` (the one that comes with the model), ``lac:path=FOLDER``, ``dense``, …
        cameras: The model's camera → key of its image; ``observation.images.<camera>`` for those left out.
        flow: Optical flow, if not the one that the policy was made for.
        max_age: No slot is reused once it is this old, frames.
        options: EngineOptions beside caching.
        image_pipeline: The model's image geometry, if not its own.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        seed: Of chance.
    """

    model: str = ""
    policy: str = "lac"
    cameras: dict[str, str] = field(default_factory=dict)
    flow: str | None = None
    max_age: int = 16
    options: str = "default"
    image_pipeline: str | None = None
    unnorm_key: str | None = None
    seed: int = 0

    @property
    def observation_delta_indices(self) -> None:
        """The present frame alone."""

    @property
    def action_delta_indices(self) -> None:
        """No actions are needed."""

    @property
    def reward_delta_indices(self) -> None:
        """No rewards are needed."""

    def get_optimizer_preset(self) -> NoReturn:
        """There is none."""
        raise NotImplementedError(NO_TRAINING)

    def get_scheduler_preset(self) -> Any:
        """There is none."""
        return None

    def validate_features(self) -> None:
        """The model checks what it is shown."""
