"""LeRobot's processors around the policy: next to none, as the model normalises by its checkpoint's statistics."""

from __future__ import annotations

from typing import Any

from lac_vla.lerobot.configuration_lac_vla import LacVlaConfig  # first: it says what is missing

from lerobot.processor import (  # isort: skip
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action  # isort: skip
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME  # isort: skip


def make_lac_vla_pre_post_processors(config: LacVlaConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Make the two pipelines.

    Args:
        config: The settings.
        dataset_stats: LeRobot's statistics; not needed.
    """
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
    ]
    return (
        PolicyProcessorPipeline(steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline(
            steps=[DeviceProcessorStep(device="cpu")],
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
