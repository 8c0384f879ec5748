"""The policy's settings, registered with LeRobot as ``lac_vla``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from lac_vla.errors import InputError, MissingExtraError

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
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in. LeRobot's own ``pretrained_path`` says
            the same: that of a SmolVLA, π0 or π0.5, say.
        policy: Caching policy: ``lac`` (the one that comes with the model), ``lac:path=FOLDER``, ``dense``, …
        cameras: The model's camera → key of its image; ``observation.images.<camera>`` for those left out.
        n_action_steps: Actions of a chunk that are executed before the model is asked again; by default what the
            checkpoint of a LeRobot policy says, and 1 of any other.
        self_check: On the first observation, see that the engine answers as the model without it does: if not, warn,
            and go on without.
        flow: See :class:`lac_vla.factory.ModelOptions`, as for all that follow.
        max_age: Control steps.
        options: Engine options.
        image_pipeline: Image geometry.
        platform: Robot of a checkpoint that does not say so.
        tokenizer: Folder or hub id of the tokenizer, which LeRobot's checkpoints do not hold.
        state_prompt: How π0.5's prompt tells the state.
        relative_actions: Leading values of π0's or π0.5's actions that are relative to the state.
        unnorm_key: Statistics key.
        seed: Seed of the session.

    Raises:
        InputError: If a revision is asked for.
    """

    model: str = ""
    policy: str = "lac"
    cameras: dict[str, str] = field(default_factory=dict)
    n_action_steps: int | None = None
    self_check: bool = True
    flow: str | None = None
    max_age: int = 16
    options: str = "default"
    image_pipeline: str | None = None
    platform: str | None = None
    tokenizer: str | None = None
    state_prompt: str | None = None
    relative_actions: int | None = None
    unnorm_key: str | None = None
    seed: int = 0

    observation_delta_indices = action_delta_indices = reward_delta_indices = None
    """The present frame alone is needed, no actions and no rewards."""
    rtc_config = None
    """LeRobot's engine for real-time chunking puts its settings here."""

    def __post_init__(self) -> None:
        """Take the checkpoint that LeRobot calls ``pretrained_path``: its processors are not for this policy."""
        super().__post_init__()
        given: Any = self.pretrained_path  # type: ignore[has-type]
        if given and not self.model:
            if getattr(self, "pretrained_revision", None):
                raise InputError("pretrained_revision is not read: download that revision, and give its folder")
            self.model, self.pretrained_path = str(given), None

    def get_optimizer_preset(self) -> NoReturn:
        """Refuse, as nothing is trained here."""
        raise NotImplementedError(NO_TRAINING)

    def get_scheduler_preset(self) -> None:
        """Return none, as nothing is trained here."""

    def validate_features(self) -> None:
        """Do nothing: the model checks its observations."""
