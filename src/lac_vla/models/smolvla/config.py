"""Configurations of SmolVLA, under sizes of its parts.

Source: SmolVLA (Shukor et al., 2025, arXiv 2506.01844) and LeRobot's code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lac_vla.errors import CheckpointError
from lac_vla.models.heads.flow_matching import FlowConfig
from lac_vla.models.lerobot_layout import ACTION, STATE, Normalization
from lac_vla.models.siglip import SiglipConfig

FFN_MULTIPLE = 256
"""An expert's feed-forward width is 8/3 of its own, rounded up to a multiple of this."""


@dataclass(frozen=True)
class TextConfig:
    """The language model, as far as it is used.

    Attributes:
        width: Channels.
        ffn: Channels of the feed-forward network.
        layers: Blocks; of a pretrained model, the first so many.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        head_dim: Channels of a head.
        vocab_size: Tokens that it knows.
        eps: Of its norms.
    """

    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocab_size: int = 49280
    eps: float = 1e-5

    def llama(self) -> dict[str, Any]:
        """Make the arguments of ``transformers.LlamaConfig``. Positions have Llama's own base, 10 000, always."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps,
            "vocab_size": self.vocab_size,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }


@dataclass(frozen=True)
class SmolVLAConfig:
    """A SmolVLA model.

    Attributes:
        text: The language model behind the prefix.
        vision: The vision tower, shared by all cameras.
        shuffle: Side of the block of patches that makes a token.
        cameras: Names in ``Frame.images``, in token order.
        state_dim: Values of the state.
        action_dim: Values of an action.
        normalization: Of both.
        flow: The action head.
        expert_width: Channels of the expert.
        expert_ffn: Channels of its feed-forward network; 0 for what its width gives.
        self_attention_every: Every so manieth layer of the expert, from the first on, is self-attention, the others are
            cross-attention; 1 for self-attention alone, 0 for cross-attention alone.
        state_width: Values of the state as the model takes it: zeros behind those of the robot.
        max_tokens: Most tokens of an instruction.

    Raises:
        CheckpointError: If the parts do not fit together.
    """

    text: TextConfig
    vision: SiglipConfig
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    normalization: Normalization
    flow: FlowConfig
    expert_width: int
    shuffle: int = 4
    expert_ffn: int = 0
    self_attention_every: int = 2
    state_width: int = 32
    max_tokens: int = 48

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise CheckpointError(f"camera names {list(self.cameras)}: give at least one, each once")
        text = self.text
        if min(text.width, text.ffn, text.layers, text.heads, text.kv_heads, text.head_dim, text.vocab_size) < 1:
            raise CheckpointError(f"a language model of {text}: give at least 1 of everything")
        if self.text.heads % self.text.kv_heads:
            raise CheckpointError(f"{self.text.heads} heads of queries, {self.text.kv_heads} of keys: no multiple")
        if self.vision.side % self.shuffle:
            raise CheckpointError(
                f"{self.vision.side} × {self.vision.side} patches do not make tokens of {self.shuffle} × {self.shuffle}"
            )
        if not 0 < self.state_dim <= self.state_width or not 0 < self.action_dim <= self.flow.width:
            raise CheckpointError(
                f"a state of {self.state_dim} and actions of {self.action_dim} values; "
                f"the model takes up to {self.state_width} and {self.flow.width}"
            )

    @property
    def side(self) -> int:
        """Tokens per side of a picture."""
        return self.vision.side // self.shuffle

    @property
    def cross(self) -> frozenset[int]:
        """The expert's layers that are cross-attention."""
        every = self.self_attention_every
        return frozenset(i for i in range(self.text.layers) if not every or i % every)

    @property
    def expert(self) -> TextConfig:
        """The expert; its vocabulary is empty."""
        text, ffn = self.text, self.expert_ffn or expert_ffn(self.expert_width)
        return TextConfig(self.expert_width, ffn, text.layers, text.heads, text.kv_heads, text.head_dim, 1, text.eps)


def expert_ffn(width: int) -> int:
    """Compute the width of an expert's feed-forward network, as LeRobot does."""
    return FFN_MULTIPLE * -(-4 * (2 * width // 3) // FFN_MULTIPLE)


def _unscaled(state_dim: int, action_dim: int) -> Normalization:
    """Make statistics of a model that was trained on nothing: the robot's units are the model's."""
    dims = {STATE: state_dim, ACTION: action_dim}
    return Normalization.of("MEAN_STD", {name: {"mean": [0.0] * n, "std": [1.0] * n} for name, n in dims.items()})


SMOLVLA_BASE = SmolVLAConfig(
    text=TextConfig(width=960, ffn=2560, layers=16, heads=15, kv_heads=5),
    vision=SiglipConfig(width=768, depth=12, heads=12, mlp_width=3072, patch=16, table=32),
    cameras=("camera1", "camera2", "camera3"),
    state_dim=6,
    action_dim=6,
    normalization=_unscaled(6, 6),
    flow=FlowConfig(horizon=50),
    expert_width=720,
)
"""``lerobot/smolvla_base``."""

TINY_SMOLVLA = SmolVLAConfig(
    text=TextConfig(width=32, ffn=48, layers=3, heads=4, kv_heads=2, head_dim=16, vocab_size=320),
    vision=SiglipConfig(width=24, depth=2, heads=2, mlp_width=32, patch=4, table=16),
    cameras=("agentview", "wrist"),
    state_dim=8,
    action_dim=7,
    normalization=_unscaled(8, 7),
    flow=FlowConfig(horizon=5, width=9, steps=4),
    expert_width=24,
    expert_ffn=40,
    state_width=10,
)
"""For tests."""

MINI_FLOW = SmolVLAConfig(
    text=TextConfig(width=192, ffn=512, layers=4, heads=6, kv_heads=6, head_dim=32, vocab_size=384, eps=1e-6),
    vision=SiglipConfig(width=128, depth=4, heads=4, mlp_width=256, patch=8, table=14),
    cameras=("agentview", "wrist"),
    state_dim=8,
    action_dim=7,
    normalization=_unscaled(8, 7),
    flow=FlowConfig(horizon=10, width=7, steps=5),
    expert_width=144,
    shuffle=2,
    state_width=8,
)
"""The bundled one: its tower and its language model are as large as those of ``mini-vit``, which has action tokens."""

PRESETS: Mapping[str, SmolVLAConfig] = {
    "smolvla-base": SMOLVLA_BASE,
    "mini-flow": MINI_FLOW,
    "smolvla-tiny": TINY_SMOLVLA,
}
