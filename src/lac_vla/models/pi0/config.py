"""Configurations of π0 and π0.5.

Sources: π0 (Black et al., 2024, arXiv 2410.24164) and π0.5 (Physical Intelligence, 2025, arXiv 2504.16054), as LeRobot
ships them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lac_vla.errors import CheckpointError
from lac_vla.models.heads.flow_matching import FlowConfig
from lac_vla.models.lerobot_layout import Normalization
from lac_vla.models.pi0.gemma import GemmaConfig
from lac_vla.models.siglip import SiglipConfig

STATE_PROMPTS = ("given", "padded", "none")
PIPELINES = ("lerobot", "lerobot-0.4", "openpi")


@dataclass(frozen=True)
class PiConfig:
    """A π0 or π0.5.

    Attributes:
        cameras: Name → name in ``Frame.images``, in token order; every one has the same tower.
        state_dim: Values of the robot's state.
        action_dim: Values of its actions.
        normalization: Of both.
        vision: The tower.
        prefix: PaliGemma's language model.
        expert: The action expert.
        vocab_size: Rows of the embedding.
        flow: The head.
        adaptive: π0.5: the time conditions the expert's norms, and the state is told in the prompt. Else π0: the time
            is mixed into the actions, and the state is a row before them.
        state_width: Values of the state as the model takes them.
        max_tokens: Longest prompt.
        state_prompt: How π0.5's prompt tells the state: one of :data:`STATE_PROMPTS`.
        relative: Which values of an action are relative to the state's at the same place, (action_dim,); empty for
            none.
        openpi: Whether openpi's ways of preparing π0's instruction and the pictures are the checkpoint's own.

    Raises:
        CheckpointError: If the parts do not fit together.
    """

    cameras: Mapping[str, str]
    state_dim: int
    action_dim: int
    normalization: Normalization
    vision: SiglipConfig
    prefix: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    flow: FlowConfig
    adaptive: bool
    state_width: int = 32
    max_tokens: int = 48
    state_prompt: str = "given"
    relative: tuple[bool, ...] = ()
    openpi: bool = False

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        own, other = self.prefix, self.expert
        if (own.depth, own.kv_heads, own.head_dim, own.heads) != (
            other.depth,
            other.kv_heads,
            other.head_dim,
            other.heads,
        ):
            raise CheckpointError(f"the expert {other} cannot read the prefix's keys and values, {own}")
        if self.state_dim > self.state_width or self.action_dim > self.flow.width:
            raise CheckpointError(
                f"a state of {self.state_dim} and actions of {self.action_dim} values; the model takes up to "
                f"{self.state_width} and {self.flow.width}"
            )
        if self.relative and (len(self.relative) != self.action_dim or self.state_dim < self.action_dim):
            raise CheckpointError(
                f"actions of {self.action_dim} values cannot be relative to a state of {self.state_dim}, as "
                f"{self.relative} says"
            )
        if self.state_prompt not in STATE_PROMPTS:
            raise CheckpointError(f"state_prompt is {self.state_prompt!r}; known are {list(STATE_PROMPTS)}")

    @property
    def reads_state(self) -> bool:
        """True if the model is told the state at all."""
        return not self.adaptive or any(self.relative) or self.state_prompt != "none"

    @property
    def family(self) -> str:
        """Key of :data:`lac_vla.models.FAMILIES`."""
        return "pi05" if self.adaptive else "pi0"


def _unscaled(state_dim: int, action_dim: int, mode: str) -> Normalization:
    """Make statistics of a model that was trained on nothing: the robot's units are the model's."""
    low, high = ("mean", "std") if mode == "MEAN_STD" else ("q01", "q99")
    first = 0.0 if mode == "MEAN_STD" else -1.0
    return Normalization.of(
        mode,
        {
            "observation.state": {low: [first] * state_dim, high: [1.0] * state_dim},
            "action": {low: [first] * action_dim, high: [1.0] * action_dim},
        },
    )


SO400M = SiglipConfig(1152, 27, 16, 4304, patch=14, table=16)
GEMMA_2B = GemmaConfig(2048, 18, 16384)
GEMMA_300M = GemmaConfig(1024, 18, 4096)

PI0 = PiConfig(
    cameras={name: name for name in ("base_0_rgb", "left_wrist_0_rgb")},
    state_dim=8,
    action_dim=7,
    normalization=_unscaled(8, 7, "MEAN_STD"),
    vision=SO400M,
    prefix=GEMMA_2B,
    expert=GEMMA_300M,
    vocab_size=257152,
    flow=FlowConfig(horizon=50),
    adaptive=False,
)
PI05 = PiConfig(
    cameras=PI0.cameras,
    state_dim=8,
    action_dim=7,
    normalization=_unscaled(8, 7, "QUANTILES"),
    vision=SO400M,
    prefix=GEMMA_2B,
    expert=GEMMA_300M,
    vocab_size=257152,
    flow=FlowConfig(horizon=50),
    adaptive=True,
    max_tokens=200,
)
PI05_SHALLOW = replace(PI05, prefix=replace(GEMMA_2B, depth=3), expert=replace(GEMMA_300M, depth=3), vocab_size=4096)
"""π0.5 with 3 of its 18 layers and 4096 words, tower and widths as they are: timed where the whole does not fit."""


def _tiny(adaptive: bool) -> PiConfig:
    return PiConfig(
        cameras={name: name for name in ("agentview", "wrist")},
        state_dim=8,
        action_dim=7,
        normalization=_unscaled(8, 7, "QUANTILES" if adaptive else "MEAN_STD"),
        vision=SiglipConfig(24, 2, 2, 48, patch=8, table=4),
        prefix=GemmaConfig(32, 2, 64, heads=8, kv_heads=1, head_dim=8),
        expert=GemmaConfig(16, 2, 32, heads=8, kv_heads=1, head_dim=8),
        vocab_size=320,
        flow=FlowConfig(horizon=4, width=12, steps=3),
        adaptive=adaptive,
        state_width=12,
        max_tokens=96,
    )


PI0_PRESETS: dict[str, PiConfig] = {"pi0": PI0, "pi0-tiny": _tiny(False)}
PI05_THREE_VIEWS = replace(PI05, cameras={**PI05.cameras, "right_wrist_0_rgb": "right_wrist_0_rgb"})
PI05_PRESETS: dict[str, PiConfig] = {
    "pi05": PI05,
    "pi05-3": PI05_THREE_VIEWS,
    "pi05-shallow": PI05_SHALLOW,
    "pi05-tiny": _tiny(True),
}
