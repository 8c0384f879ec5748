"""The policy: LeRobot's interface over one session."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA, ModelOptions
from lac_vla.lerobot.bridge import Bridge
from lac_vla.lerobot.configuration_lac_vla import NO_TRAINING, LacVlaConfig

from lerobot.policies.pretrained import PreTrainedPolicy  # isort: skip # the configuration says what is missing


class LacVlaPolicy(PreTrainedPolicy):  # type: ignore[misc]
    """A VLA with its caching policy, for one robot; what LeRobot saves of it are its settings.

    Args:
        config: The settings.
        dataset_stats: LeRobot's statistics; not needed, the checkpoint has its own.
        dataset_meta: LeRobot's description of a dataset; not needed.

    Raises:
        InputError: If a setting cannot be used.
        CheckpointError: If the model cannot be loaded.
    """

    config_class = LacVlaConfig
    name = "lac_vla"

    def __init__(self, config: LacVlaConfig, dataset_stats: Any = None, dataset_meta: Any = None) -> None:
        super().__init__(config)
        if not config.model:
            raise InputError("which model? Give its checkpoint folder or hub id: --policy.model=…")
        options = ModelOptions(
            device=config.device or "cpu", unnorm_key=config.unnorm_key, image_pipeline=config.image_pipeline,
            platform=config.platform, flow=config.flow, max_age=config.max_age, options=config.options,
            seed=config.seed,
        )  # fmt: skip
        vla = CachedVLA.from_pretrained(config.model, config.policy, options)
        self.bridge = Bridge(vla, config.cameras, options.seed, config.n_action_steps)

    def reset(self) -> None:
        """Begin a new episode."""
        self.bridge.reset()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """Ask the model, and return the whole chunk, float32, (1, horizon, A)."""
        return torch.from_numpy(self.bridge.act(batch))[None].to(self.config.device)

    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """Return the next action, float32, (1, A); the model is asked once in ``n_action_steps`` calls."""
        return torch.from_numpy(self.bridge.next_action(batch))[None].to(self.config.device)

    def forward(self, batch: dict[str, Any]) -> NoReturn:
        """Refuse, as nothing is trained here."""
        raise NotImplementedError(NO_TRAINING)

    def get_optim_params(self) -> NoReturn:
        """Refuse, as nothing is trained here."""
        raise NotImplementedError(NO_TRAINING)
