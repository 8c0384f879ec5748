"""The policy's settings, registered with LeRobot as ``lac_vla``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

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
    """Settings of the policy, beside LeRobot's own.

    Attributes:
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in.
        policy: Caching policy: ``lac`` (the one that comes with the model), ``lac:path=FOLDER``, ``dense``, …
        cameras: The model's camera → key of its image; ``observation.images.<camera>`` for those left out.
        n_action_steps: Actions of a chunk that are executed before the model is asked again.
        flow: See :class:`lac_vla.factory.ModelOptions`, as for all that follow.
        max_age: Control steps.
        options: Engine options.
        image_pipeline: Image geometry.
        platform: Robot of a checkpoint that does not say so.
        unnorm_key: Statistics key.
        seed: Seed of the session.
    """

    model: str = ""
    policy: str = "lac"
    cameras: dict[str, str] = field(default_factory=dict)
    n_action_steps: int = 1
    flow: str | None = None
    max_age: int = 16
    options: str = "default"
    image_pipeline: str | None = None
    platform: str | None = None
    unnorm_key: str | None = None
    seed: int = 0

    observation_delta_indices = action_delta_indices = reward_delta_indices = None
    """The present frame alone is needed, no actions and no rewards."""

    def get_optimizer_preset(self) -> NoReturn:
        """Refuse, as nothing is trained here."""
        raise NotImplementedError(NO_TRAINING)

    def get_scheduler_preset(self) -> None:
        """Return none, as nothing is trained here."""

    def validate_features(self) -> None:
        """Do nothing: the model checks its observations."""
