"""Configurations of CogACT: a Prismatic VLM, and a diffusion transformer that turns one hidden state into actions.

Source: CogACT (Li et al., 2024, arXiv 2411.19650) and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lac_vla.checks import check_fields
from lac_vla.errors import CheckpointError
from lac_vla.models.heads.dit import DIT, DiTConfig
from lac_vla.models.heads.sampler import Sampling
from lac_vla.models.prismatic.config import OPENVLA_PROMPT_END, PrismaticConfig
from lac_vla.models.prismatic.presets import MINI, OPENVLA_7B, TINY

COGNITION_TOKEN = 2
"""Llama 2's end of a sequence. It ends CogACT's prompts; its last hidden state is the cognition feature."""
BASE_VLM = "prism-dinosiglip-224px+7b"
"""The VLM that all published CogACT models are built on; OpenVLA's."""


@dataclass(frozen=True)
class CogACTConfig:
    """A CogACT model.

    Attributes:
        vlm: Towers, projector and language model. Its prompts end with ``prompt_end``, its own ``prompt_end_id`` is
            ``None``.
        head: The action head.
        prompt_end: Tokens behind the tokenizer's.
        sampling: How the head draws actions unless told otherwise.
        gripper: What closed and open are in the data set's units, where the statistics leave the gripper unscaled.
        ensemble: How many of the last chunks an evaluation averages unless told otherwise; 1 for the newest alone.

    Raises:
        CheckpointError: If the parts do not fit together.
    """

    vlm: PrismaticConfig
    head: DiTConfig
    prompt_end: tuple[int, ...] = (OPENVLA_PROMPT_END, COGNITION_TOKEN)
    sampling: Sampling = field(default_factory=Sampling)
    gripper: tuple[float, float] = (0.0, 1.0)
    ensemble: int = 1

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        check_fields(self, CheckpointError)
        if self.gripper[0] == self.gripper[1]:
            raise CheckpointError(f"gripper is {self.gripper}: closed and open must differ")
        if not 1 <= self.ensemble <= self.head.horizon:
            raise CheckpointError(f"ensemble is {self.ensemble}; give 1 to {self.head.horizon}, the length of a chunk")
        if self.head.condition != self.vlm.width:
            raise CheckpointError(
                f"the action head takes features of width {self.head.condition}, the VLM's have {self.vlm.width}"
            )


def vlm_config(data: Mapping[str, Any], norm_stats: Mapping[str, Any]) -> PrismaticConfig:
    """Read the VLM of a run's ``config.json``: its ``vla.base_vlm``, or what ``vlm`` spells out (not official).

    Raises:
        CheckpointError: If it is another VLM than :data:`BASE_VLM`.
    """
    if isinstance(data.get("vlm"), Mapping):
        vlm = PrismaticConfig.from_json({**data["vlm"], "norm_stats": norm_stats})
        return replace(vlm, prompt_end_id=None)
    vla = data.get("vla")
    base = vla.get("base_vlm") if isinstance(vla, Mapping) else None
    if base != BASE_VLM:
        raise CheckpointError(f"config.json: vla.base_vlm is {base!r}; only '{BASE_VLM}' is supported")
    return replace(OPENVLA_7B, norm_stats=norm_stats, prompt_end_id=None)


def head_config(data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    """Find the action head that the weights are of, by their shapes; an official ``config.json`` need not tell.

    ``action_model.heads`` in it (not official) is for unpublished widths.

    Raises:
        CheckpointError: If there is no action head, or the number of its attention heads is not known.
    """
    net = "action_model.net."
    try:
        width, action_dim = shapes[f"{net}x_embedder.linear.weight"]
        condition = shapes[f"{net}z_embedder.linear.weight"][1]
        horizon = shapes[f"{net}positional_embedding"][0] - 1
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError("the weights hold no CogACT action head (action_model): another model family?") from error
    depth = len({key.split(".")[3] for key in shapes if key.startswith(f"{net}blocks.")})
    given = data.get("action_model")
    heads = (
        given.get("heads") if isinstance(given, Mapping) else {dit.width: dit.heads for dit in DIT.values()}.get(width)
    )
    if not isinstance(heads, int):
        raise CheckpointError(
            f"action head of width {width}, none of the published {list(DIT)}: give action_model.heads in config.json"
        )
    return DiTConfig(width, depth, heads, action_dim, horizon, condition)


def own_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of :class:`CogACTConfig` that a ``config.json`` of ours spells out; an official one has none.

    Raises:
        CheckpointError: If one of them is not understood.
    """
    try:
        read: dict[str, Any] = {
            "prompt_end": tuple,
            "sampling": lambda values: Sampling(**values),
            "gripper": lambda values: (lambda closed, opened: (closed, opened))(*values),
            "ensemble": lambda value: value,
        }
        return {name: make(data[name]) for name, make in read.items() if name in data}
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"config.json does not describe a CogACT model: {error}") from error


COGACT_7B = CogACTConfig(replace(OPENVLA_7B, prompt_end_id=None), DIT["DiT-B"])
"""CogACT-Base."""

TINY_COGACT = CogACTConfig(
    replace(TINY, prompt_end_id=None),
    DiTConfig(width=24, depth=2, heads=2, condition=32),
    prompt_end=(1, COGNITION_TOKEN),
    sampling=Sampling(steps=4),
)
"""For tests."""

MINI_COGACT = CogACTConfig(
    replace(MINI, prompt_end_id=None),
    DiTConfig(width=128, depth=2, heads=4, condition=192),
    prompt_end=(COGNITION_TOKEN,),
    sampling=Sampling(steps=5),
    gripper=(1.0, -1.0),
    ensemble=4,
)
"""``mini`` with CogACT's head. Its prompt ends as before: what read the first action token is the cognition feature."""

PRESETS: dict[str, CogACTConfig] = {
    "cogact-7b": COGACT_7B,
    "mini-cogact": MINI_COGACT,
    "cogact-tiny": TINY_COGACT,
}
