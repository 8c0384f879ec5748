"""SmolVLA's action head: its expert, run behind the prefix at every Euler step."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.models.heads.base import AppendRows, HeadContext, LossContext
from lac_vla.models.heads.flow_matching import FlowConfig, FlowMatchingHead, Velocity, time_embedding
from lac_vla.models.lerobot_layout import Units
from lac_vla.models.protocols import KeysValues
from lac_vla.models.smolvla.model import SmolVLAModel
from lac_vla.models.smolvla.stacks import ExpertStack


class SmolVLAHead(FlowMatchingHead):
    """Draws a chunk of actions; see :class:`FlowMatchingHead`.

    Args:
        model: The modules.
        expert: The expert's layers.
        config: The head's shape.
        units: Units of the actions.
    """

    def __init__(self, model: SmolVLAModel, expert: ExpertStack, config: FlowConfig, units: Units) -> None:
        super().__init__(config, units)
        self._model, self._expert = model, expert
        self._times = self._embed_times(torch.tensor(config.times))

    @property
    def like(self) -> torch.Tensor:
        """A weight of the head."""
        return self._model.linear("action_out_proj").weight

    def begin(self, context: HeadContext) -> tuple[dict[int, KeysValues], torch.Tensor]:
        """Project the prefix for the layers of cross-attention, and the times of all steps."""
        if self._times.device != self.like.device:
            self._times = self._times.to(self.like.device)
        times = self._project_times(self._times.to(self.like.dtype))
        return self._expert.project(context.keys, context.values), times

    def velocity(self, shared: tuple[dict[int, KeysValues], torch.Tensor], noised: torch.Tensor, step: int) -> Velocity:
        """Run the expert; see :meth:`FlowMatchingHead.velocity`."""
        cross, times = shared
        hidden = yield AppendRows(self._embed(noised, times[step]), at=0, stack=self._expert, cross=cross)
        return self._read(hidden)

    def train_velocity(
        self, context: LossContext, states: torch.Tensor, noised: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Run the expert behind a batch; see :meth:`FlowMatchingHead.train_velocity`."""
        projected = self._project_times(self._embed_times(times).to(self.like.dtype))
        rows = self._embed(noised, projected[:, None])
        cross = self._expert.project(context.keys, context.values)
        return self._read(context.run(AppendRows(rows, stack=self._expert, cross=cross)))

    def _embed_times(self, times: torch.Tensor) -> torch.Tensor:
        config = self.config
        return time_embedding(times, self._expert.shape.width, config.min_period, config.max_period)

    def _project_times(self, embedded: torch.Tensor) -> torch.Tensor:
        """Run the part of the first layer that takes times, (..., width)."""
        layer = self._model.linear("action_time_mlp_in")
        return F.linear(embedded, layer.weight[:, embedded.shape[-1] :], layer.bias)

    def _embed(self, noised: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Embed (..., horizon, action width) at projected times, (..., width)."""
        model, layer = self._model, self._model.linear("action_time_mlp_in")
        actions = model.linear("action_in_proj")(noised.to(self.like.dtype))
        joined = F.linear(actions, layer.weight[:, : actions.shape[-1]]) + times
        rows: torch.Tensor = model.linear("action_time_mlp_out")(F.silu(joined))
        return rows

    def _read(self, hidden: torch.Tensor) -> torch.Tensor:
        velocity: torch.Tensor = self._model.linear("action_out_proj")(hidden)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))
