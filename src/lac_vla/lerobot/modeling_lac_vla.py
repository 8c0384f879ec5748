"""The policy: LeRobot's interface over one session."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch

from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA, ModelOptions
from lac_vla.lerobot.bridge import Bridge, own_action_steps, running_chunk
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
            tokenizer=config.tokenizer, state_prompt=config.state_prompt, relative_actions=config.relative_actions,
            seed=config.seed,
        )  # fmt: skip
        vla = CachedVLA.from_pretrained(config.model, config.policy, options)
        if config.n_action_steps is None:
            config.n_action_steps = own_action_steps(config.model)
        self.bridge = Bridge(vla, config.cameras, options.seed, config.n_action_steps, self_check=config.self_check)

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path | None = None, *, config: LacVlaConfig | None = None, **_: Any
    ) -> LacVlaPolicy:
        """Make the policy of settings; there are no weights beside the model's own.

        Args:
            pretrained_name_or_path: A model, see :class:`LacVlaConfig`; not read if there are settings.
            config: The settings, which say what the model is.
        """
        made = cls(LacVlaConfig(model=str(pretrained_name_or_path or "")) if config is None else config)
        made.eval()
        return made

    def supports_rtc(self) -> bool:
        """Tell LeRobot's engine for real-time chunking whether the model can go on with a running chunk."""
        return self.bridge.supports_rtc

    def reset(self) -> None:
        """Begin a new episode."""
        self.bridge.reset()

    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Ask the model, and return the whole chunk, float32, (1, horizon, A).

        Args:
            batch: The observation.
            inference_delay: Control steps until the answer acts.
            prev_chunk_left_over: What is left of the running chunk, in the robot's units, (n, A) or (1, n, A): the
                answer goes on with it, unless LeRobot's settings of real-time chunking say that it is off.
        """
        rtc, settings = None, self.config.rtc_config
        if prev_chunk_left_over is not None and (settings is None or settings.enabled):
            rtc = running_chunk(prev_chunk_left_over, inference_delay, self.bridge.horizon, settings)
        return torch.from_numpy(self.bridge.act(batch, rtc))[None].to(self.config.device)

    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """Return the next action, float32, (1, A); the model is asked once in ``n_action_steps`` calls."""
        return torch.from_numpy(self.bridge.next_action(batch))[None].to(self.config.device)

    def forward(self, batch: dict[str, Any]) -> NoReturn:
        """Refuse, as nothing is trained here."""
        raise NotImplementedError(NO_TRAINING)

    def get_optim_params(self) -> NoReturn:
        """Refuse, as nothing is trained here."""
        raise NotImplementedError(NO_TRAINING)
