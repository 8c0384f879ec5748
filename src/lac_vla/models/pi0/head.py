"""The action expert of π0 and π0.5, a flow-matching head: its rows run behind the prompt, over its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.errors import InputError
from lac_vla.models.heads.base import AppendRows, HeadContext, LossContext
from lac_vla.models.heads.flow_matching import FlowMatchingHead, Velocity, time_embedding
from lac_vla.models.lerobot_layout import Units
from lac_vla.models.pi0.gemma import AdaptiveNorm, GemmaBlocks, ModulatedNorm, StateFirst
from lac_vla.models.pi0.model import PiModel
from lac_vla.transfer import upload
from lac_vla.types import FloatArray, Frame


@dataclass(frozen=True, eq=False)
class Step:
    """One Euler step's share of the work that neither frame nor actions change.

    Attributes:
        stack: The expert at that time.
        time: What is added to every action's row; ``None`` for nothing.
    """

    stack: GemmaBlocks
    time: torch.Tensor | None = None


class PiHead(FlowMatchingHead):
    """Runs the expert's rows in every Euler step: π0's state row in the first alone, for it sees nothing that changes.

    Args:
        model: The modules.
        action_units: Units of the actions.
        state_units: Units of the state.

    Raises:
        CheckpointError: If the robot's actions have more values than the model's.
    """

    def __init__(self, model: PiModel, action_units: Units, state_units: Units) -> None:
        super().__init__(model.config.flow, action_units)
        self._model, self._state_units = model, state_units
        self._adaptive = model.config.adaptive
        self._relative = np.array(model.config.relative or (False,) * self.units.dim)
        self.max_new_tokens = self.horizon + (not self._adaptive)
        self._plain = None if self._adaptive else StateFirst(model.expert)
        self._steps: tuple[object, list[Step]] = (None, [])

    @property
    def like(self) -> torch.Tensor:
        """A weight of the projections."""
        return self._model.action_in_proj.weight

    def begin(self, context: HeadContext) -> tuple[Sequence[Step], torch.Tensor | None]:
        """Get the steps, and embed π0's state, (1, width)."""
        if self._adaptive:
            return self.steps(), None
        state = self.padded_state(context.frame.proprio)
        return self.steps(), cast(torch.Tensor, self._model.state_proj(upload(state, self.like.device)))[None]

    def padded_state(self, state: FloatArray | None) -> torch.Tensor:
        """Normalise a state in the robot's units, and fill it up with zeros: (..., state_dim) → (..., state_width)."""
        if state is None:
            raise InputError("the model needs a state: give Frame.proprio")
        normalized = torch.from_numpy(self._state_units.normalize(state))
        return F.pad(normalized, (0, self._model.config.state_width - normalized.shape[-1]))

    def velocity(self, shared: tuple[Sequence[Step], torch.Tensor | None], noised: torch.Tensor, step: int) -> Velocity:
        """Run the expert at one time; see :meth:`FlowMatchingHead.velocity`."""
        steps, state = shared
        now = steps[step]
        rows, at = self._rows(noised, now.time), 0
        if state is not None:
            rows, at = (torch.cat([state, rows]), 0) if step == 0 else (rows, 1)
        hidden = yield AppendRows(rows.to(now.stack.weight.dtype), at, now.stack)
        return cast(torch.Tensor, self._model.action_out_proj(hidden[-self.horizon :].to(self.like.dtype)))

    def train_velocity(
        self, context: LossContext, states: torch.Tensor, noised: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Run the expert behind a batch of prompts; see :meth:`FlowMatchingHead.train_velocity`."""
        embedded = self._embed_time(times)[:, None]
        if self._plain is None:
            stack, rows = GemmaBlocks(self._model.expert, self._modulate(embedded)), self._rows(noised, None)
        else:
            state = F.pad(states, (0, self._model.config.state_width - states.shape[-1]))
            stack, rows = self._plain, self._rows(noised, embedded)
            rows = torch.cat([self._model.state_proj(state)[:, None], rows], dim=1)
        hidden = context.run(AppendRows(rows.to(stack.weight.dtype), stack=stack))
        return cast(torch.Tensor, self._model.action_out_proj(hidden[:, -self.horizon :].to(self.like.dtype)))

    def normalized_actions(self, actions: FloatArray, frame: Frame) -> FloatArray:
        """Map a chunk to the model's units; what is relative to the state is first taken from it."""
        return self.units.normalize(actions - self._origin(frame.proprio) if self._relative.any() else actions)

    def robot_actions(self, normalized: FloatArray, frame: Frame) -> FloatArray:
        """Map a chunk to the robot's own units; what is relative to the state is added to it."""
        actions = self.units.unnormalize(normalized)
        return actions + self._origin(frame.proprio) if self._relative.any() else actions

    def targets(self, actions: FloatArray) -> npt.NDArray[np.float32]:
        """Flatten chunks; they are normalised by :meth:`with_states` where they are relative to the state."""
        return self.chunks(actions).reshape(len(actions), -1) if self._relative.any() else super().targets(actions)

    def with_states(self, targets: npt.NDArray[Any], states: FloatArray) -> npt.NDArray[Any]:
        """Put normalised states before the targets of π0, (T, state_dim + n); π0.5's prompt tells them."""
        if self._adaptive and not self._relative.any():
            return targets
        if states.shape != (len(targets), self._state_units.dim):
            raise InputError(
                f"the dataset's states have shape {states.shape}; the model needs {self._state_units.dim} values"
            )
        if self._relative.any():
            chunks = targets.reshape(len(targets), self.horizon, -1)
            targets = self.normalized(chunks - self._origin(states)[:, None])
        return targets if self._adaptive else np.concatenate([self._state_units.normalize(states), targets], axis=1)

    def _origin(self, states: FloatArray | None) -> FloatArray:
        """Take what relative actions are relative to, zero for the others: (..., state_dim) → (..., action_dim)."""
        if states is None:
            raise InputError("the model's actions are relative to the state: give Frame.proprio")
        origin: FloatArray = np.where(self._relative, states[..., : self.units.dim], np.float32(0))
        return origin

    def steps(self) -> Sequence[Step]:
        """Get what the fixed times of the Euler steps give; it is computed anew if the weights have changed."""
        weights = [parameter for module in self._model.around for parameter in module.parameters()]
        version = [(id(w), 0 if w.is_inference() else w._version, w.device) for w in weights]
        if self._steps[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                times = torch.tensor(self.config.times, device=self.like.device)
                self._steps = version, self._steps_at(times)
        return self._steps[1]

    def _steps_at(self, times: torch.Tensor) -> list[Step]:
        """Compute the steps at some times, (T,)."""
        embedded = self._embed_time(times)
        if self._plain is not None:
            return [Step(self._plain, row) for row in embedded]
        norms = self._modulate(embedded)
        return [Step(GemmaBlocks(self._model.expert, [norm[i] for norm in norms])) for i in range(len(times))]

    def _embed_time(self, times: torch.Tensor) -> torch.Tensor:
        """Embed times, (...) → (..., width): what conditions π0.5's norms, or its part of π0's first layer."""
        model, width, config = self._model, self._model.config.expert.width, self.config
        embedded = time_embedding(times, width, config.min_period, config.max_period).to(self.like.dtype)
        if self._adaptive:
            return F.silu(cast(torch.Tensor, model.time_mlp_out(F.silu(model.time_mlp_in(embedded)))))
        return F.linear(embedded, model.action_time_mlp_in.weight[:, width:], model.action_time_mlp_in.bias)

    def _modulate(self, condition: torch.Tensor) -> list[ModulatedNorm]:
        return [ModulatedNorm.of(cast(AdaptiveNorm, norm), condition) for norm in self._model.expert.norms]

    def _rows(self, noised: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        """Embed noised actions: (..., horizon, action width) → (..., horizon, width)."""
        model = self._model
        rows: torch.Tensor = model.action_in_proj(noised.to(self.like.dtype))
        if time is None:
            return rows
        mixed = F.linear(rows, model.action_time_mlp_in.weight[:, : rows.shape[-1]]) + time
        return cast(torch.Tensor, model.action_time_mlp_out(F.silu(mixed)))
